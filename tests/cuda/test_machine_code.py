"""The machine code that nvcc made of csrc/cuda, inside the installed vfengine_native.

Triton's cuobjdump reads it. A module that was built without nvcc has none.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from triton_tools import NVIDIA_BIN

from vfengine.native import vfengine_native

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = vfengine_native.cuda_architectures.split() or ["none"]  # CUDAARCHS picks them
# Clips and images that may be read: g, d_t and d_p among them.
OPS = {"ResidualStep": 4, "DecomposedStep": 3, "RemoveBase": 2, "PathStep": 4}
# What is narrower: step, its row and lam; c1 and the next timestep along a path.
NARROW = {"ResidualStep": 5, "DecomposedStep": 5, "RemoveBase": 3, "PathStep": 7}

pytestmark = pytest.mark.skipif(
    not vfengine_native.cuda_built and os.environ.get("VFENGINE_CUDA") != "on",
    reason="vfengine_native was built without nvcc",
)


def dump(what: str, arch: str) -> str:
    env = {**os.environ, "PATH": f"{NVIDIA_BIN}:{os.environ['PATH']}"}  # it calls nvdisasm
    command = [NVIDIA_BIN / "cuobjdump", "-arch", f"sm_{arch}", f"--dump-{what}"]
    done = subprocess.run(
        [*command, vfengine_native.__file__], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def kernels(request) -> dict[str, tuple[Counter, dict[str, int]]]:
    """{kernel: (instructions by name, what a thread takes)} of one architecture."""
    code, current = {}, Counter()
    instruction = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    for line in dump("sass", request.param).splitlines():
        if function := re.search(r"Function : (\S+)", line):
            current = code.setdefault(function[1], Counter())
        elif found := instruction.match(line):
            current[found[1]] += 1
    usage = {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", facts)}
        for name, facts in re.findall(
            r"Function (\S+):\n\s*(.*)", dump("resource-usage", request.param)
        )
    }
    return {name: (code[name], usage[name]) for name in code}


def count(code: Counter, pattern: str) -> int:
    return sum(n for name, n in code.items() if re.match(pattern, name))


def template(name: str, kernel: str) -> str:
    """The template arguments of a mangled name; "" where it is another kernel."""
    found = re.search(rf"{kernel}I(.*)EEEvNS_", name)
    return found[1] if found else ""


def test_every_kernel_is_there(kernels):
    frames = [name for name in kernels if "frames_kernel" in name]
    noise = [name for name in kernels if "noise_kernel" in name]
    norm = [name for name in kernels if "group_norm_silu" in name]
    attention = [name for name in kernels if "attention_kernel" in name]
    base = [name for name in kernels if "base_step_kernel" in name]
    # 3 dtypes, vectors or not, drawn noise or not where a rule has noise; words for the noise.
    assert len(frames) == 3 * 2 * (2 + 2 + 2 + 1)
    assert len(base) == 2 * 2  # vectors or not, drawn noise or not
    assert len(noise) == 4 * 2
    assert len(norm) == 3 * (1 + 2 * 2)  # dtypes; one launch for vectors, two for any memory
    assert len(attention) == 4 + 2 * 3 * 2  # fp32; 16-bit dtypes, vectors or not: head dimensions
    assert len(kernels) == len(frames) + len(base) + len(noise) + len(norm) + len(attention)


def test_nothing_spills(kernels):
    for name, (code, usage) in kernels.items():
        assert usage["STACK"] == usage["LOCAL"] == 0, name
        assert count(code, r"LDL|STL") == 0, name


def test_registers_leave_room_for_threads(kernels):
    """With 64 registers 4 blocks of 256 threads fit on a processor, with 80 only 3, with 128 2.

    Steps of clips that are not whole vectors may take 128.
    """
    for name, (_, usage) in kernels.items():
        main_path = template(name, "frames_kernel").endswith("Lb1ELb0")  # vectors, nothing drawn
        of_64 = main_path or "noise_kernel" in name
        by_elements = "Lb0ELb" in template(name, "frames_kernel")
        if "tensor_attention" in name:  # blocks of 128 threads: three of them, or two
            assert usage["REG"] <= (168 if "Li64ELb1" in name else 255), name
        elif "group_norm" in name or "attention_kernel" in name or by_elements:
            assert usage["REG"] <= 128, name  # two blocks of 256 threads, or four of 128
        else:
            assert usage["REG"] <= (64 if of_64 else 80), name


def test_every_kernel_waits_for_those_before_it_ahead_of_its_first_access(kernels, request):
    """From sm_90 on, where launches are programmatic dependent ones (csrc/common/cuda_launch.h)."""
    access = r"LDG|STG|LD\.|ST\.|LDGSTS|ATOM|RED|UTMA|UBLK"
    waits = int(request.node.callspec.params["kernels"]) >= 90
    for name, (code, _) in kernels.items():
        order = [instruction for instruction in code if re.match(rf"ACQBULK|{access}", instruction)]
        assert (order[0] == "ACQBULK") == waits, name
        assert count(code, "ACQBULK") == count(code, "PREEXIT") == waits, name


def test_shared_memory_is_what_every_gpu_gives_without_asking(kernels):
    for name, (_, usage) in kernels.items():
        assert usage["SHARED"] <= 48 << 10, name


@pytest.mark.parametrize("op", OPS)
def test_main_path_moves_16_bytes_an_instruction(kernels, op):
    paths = 0
    for name, (code, _) in kernels.items():
        arguments = template(name, "frames_kernel")
        if op not in arguments or "Lb1ELb" not in arguments:
            continue
        paths += 1
        assert count(code, r"LDG\.E\.128") >= OPS[op], name
        assert count(code, r"STG\.E\.128") >= 1, name
        # Along a path the counter, and the timestep of every sample, are written too.
        stores = count(code, r"STG")
        assert stores == count(code, r"STG\.E\.128$") or op == "PathStep", name
        assert count(code, r"STG.*STRONG|STG\.E\.U?16") == 0, name
        assert count(code, r"LDG") - count(code, r"LDG\.E\.128") <= NARROW[op], name
        assert count(code, r"LDG\.E\.U16") == 0, name
        assert count(code, r"ATOM") == (op == "PathStep"), name
    assert paths == 3 * (1 if op == "RemoveBase" else 2)


def test_weights_are_computed_before_the_frames(kernels):
    """A square root, or a division of 64-bit integers, has a branch to a slow path.

    Two of a block's weights have one; noise has none, and nobody divides.
    """
    for name, (code, _) in kernels.items():
        if "noise_kernel" in name:
            assert count(code, r"CALL|RET") == 0, name
        elif "frames_kernel" in name:
            roots = 1 if "RemoveBase" in name else 2
            assert count(code, r"CALL") <= roots, name


@pytest.mark.parametrize("kernel", ["slab_kernel", "chunk_kernel", "apply_kernel"])
def test_group_norm_has_8_loads_of_16_bytes_in_flight(kernels, kernel):
    paths = 0
    for name, (code, _) in kernels.items():
        if kernel not in name or "Lb0E" in name:
            continue
        paths += 1
        assert count(code, r"LDG\.E\.128") >= 8, name
        assert count(code, r"LDG\.E\.U16") == 0, name
        stored = count(code, r"STG\.E\.128")
        assert (stored >= 1 and stored == count(code, r"STG")) == (kernel != "chunk_kernel"), name
    assert paths == 3


def test_attention_of_fp32_moves_16_bytes_an_instruction_and_shuffles_no_products(kernels):
    """q, k and v come as vectors where qkv is aligned; a row's D products are summed in a lane."""
    paths = 0
    for name, (code, _) in kernels.items():
        if not template(name, "16attention_kernel"):
            continue
        paths += 1
        assert count(code, r"LDG\.E\.128") >= 3, name
        assert count(code, r"LDS\.128") >= 3, name
        assert count(code, r"FFMA") >= 32, name
        assert count(code, r"SHFL") <= 2 * 2 * 4, name  # a maximum and a sum of two queries
    assert paths == 4


def test_attention_of_16_bits_runs_on_tensor_cores_without_a_barrier(kernels):
    """q, k and v come as vectors, and no lane needs another's but for a row's maximum and sum."""
    paths = 0
    for name, (code, _) in kernels.items():
        arguments = template(name, "tensor_attention_kernel")
        if not arguments.endswith("Lb1"):
            continue
        paths += 1
        channels = 64 if "Li64E" in arguments else 128  # of y
        assert count(code, r"HMMA\.16816\.F32") >= 8 + channels // 8, name
        assert count(code, r"LDG\.E\.128") >= 8 + channels // 16, name
        assert count(code, r"LDG\.E\.U16") == count(code, r"LDS|STS|BAR") == 0, name
        assert count(code, r"STG") == count(code, r"STG\.E\.128") == channels // 16, name
        assert count(code, r"SHFL") <= 12, name  # 8, of two rows, and copies of a branch
    assert paths == 2 * 3


def test_noise_is_written_16_bytes_an_instruction(kernels):
    for name, (code, _) in kernels.items():
        if template(name, "noise_kernel").endswith("Lb1"):
            assert count(code, r"STG") == count(code, r"STG\.E\.128") >= 1, name


def test_no_multiplication_is_fused_with_an_addition(kernels):
    """Fused, the bits would not be those of the CPU.

    A square root brings FMAs of its own, and as many FMUL.FTZ: what is more would be ours. Group
    norm and attention promise no bits, and ask for FMAs by name.
    """
    for name, (code, _) in kernels.items():
        if "frames_kernel" not in name and "noise_kernel" not in name:
            continue
        assert count(code, r"FFMA") == count(code, r"FMUL\.FTZ"), name
        if "frames_kernel" in name:
            assert count(code, r"FMUL$") > 0, name


def test_build_refuses_local_memory(tmp_path):
    """The nvcc options of CMakeLists.txt, on a kernel that needs local memory."""
    options = re.search(r'"SHELL:(-Xptxas [^"]+)"', (ROOT / "CMakeLists.txt").read_text())
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    source = tmp_path / "local.cu"
    kernel = "__global__ void k(int* p) {{ {} p[0] = {}; }}"
    for body, value, refused in (
        ("int a[64] = {0}; for (int i = 0; i < 64; ++i) a[p[i] & 63] += i;", "a[p[64]]", True),
        ("", "1", False),
    ):
        source.write_text(kernel.format(body, value))
        command = [nvcc, "-arch=sm_90", *options[1].split(), "-cubin", str(source)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode != 0) == refused, done.stderr
        assert ("local memory" in done.stderr.lower()) == refused, done.stderr
