"""The CUDA emulator itself (tests/tools/emulation): right answers, and every planted bug caught.

The kernels are in tests/tools/emulation/planted/planted.cu, one case each.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from emulation.build import EMULATION, build_program, command, environment, write_import_hook

PLANTED = EMULATION / "planted" / "planted.cu"
SUMS = [8128, 24512, 40896, 57280]  # of 0..127, 128..255, ...
IN_ORDER = None
ORDERS = [IN_ORDER, 1, 2, 3]


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """planted(variant, case, seed) runs a case of planted.cu."""
    folder = tmp_path_factory.mktemp("planted")
    with ThreadPoolExecutor(2) as pool:
        variants = ("plain", "address", "thread")
        list(pool.map(lambda variant: build_program(variant, PLANTED, folder / variant), variants))

    def run(variant, case, seed=IN_ORDER):
        return subprocess.run(
            [*command(variant), str(folder / variant), case],
            env=environment(variant, None, seed),
            capture_output=True,
            text=True,
        )

    return run


def numbers(result) -> list[float]:
    assert result.returncode == 0, result.stderr
    return [float(word) for word in result.stdout.split()]


def assert_caught(result, *words):
    assert result.returncode != 0, f"not caught; printed {result.stdout!r}"
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.mark.parametrize("variant", ["plain", "address", "thread"])
@pytest.mark.parametrize("seed", ORDERS)
def test_block_sum_is_right_in_every_order(planted, variant, seed):
    assert numbers(planted(variant, "block_sum", seed)) == SUMS


@pytest.mark.parametrize("variant", ["plain", "address", "thread"])
@pytest.mark.parametrize("case, expected", [("rotate", [5, 127, 0]), ("syncwarp", [1, 30])])
def test_barriers_order_memory(planted, variant, case, expected):
    assert numbers(planted(variant, case, seed=1)) == expected


@pytest.mark.parametrize("variant", ["plain", "thread"])
def test_atomics_of_all_blocks_add_up(planted, variant):
    assert numbers(planted(variant, "atomic", seed=1)) == [24]


def test_shuffles_follow_cuda(planted):
    # Lane 5 asks for index 3, up 1, down 2, xor 4 (5 ^ 4 = 1); lane 7 of a segment of 8 for index
    # 11, which wraps, up 1, down 2, which leaves the segment, and xor 4.
    assert numbers(planted("plain", "shuffles")) == [3, 4, 7, 1, 3, 6, 7, 3]


@pytest.mark.parametrize("case", ["product", "product_bf16"])
def test_a_warps_product_has_the_fragments_of_ptx(planted, case):
    assert numbers(planted("plain", case, seed=1)) == [0]  # elements that are wrong


@pytest.mark.parametrize("variant", ["plain", "address"])
def test_dynamic_shared_memory_must_be_asked_for(planted, variant):
    invalid = 1  # cudaErrorInvalidValue
    assert numbers(planted(variant, "dynamic_shared")) == [invalid, 0, 1, 0]


@pytest.mark.parametrize("seed", ORDERS)
def test_shuffled_orders_differ(planted, seed):
    first = planted("plain", "first_to_arrive", seed)
    in_order = planted("plain", "first_to_arrive", IN_ORDER)
    assert numbers(in_order) == [0, 0]  # block, thread
    assert (numbers(first) == [0, 0]) == (seed is IN_ORDER)
    assert first.stdout == planted("plain", "first_to_arrive", seed).stdout


def test_bad_launch_configurations_are_errors(planted):
    invalid = 9  # cudaErrorInvalidConfiguration
    assert planted("plain", "bad_launch").stdout.splitlines() == [
        f"{invalid} invalid configuration argument",  # 1025 threads
        f"{invalid} invalid configuration argument",  # grid.y = 65536
        f"{invalid} invalid configuration argument",  # no block
        "0 no error",  # 1024 threads
        "1024",  # and no other launch ran
    ]


def test_missing_barrier_gives_nan(planted):
    sums = numbers(planted("plain", "missing_barrier"))
    assert sums != SUMS and all(x != x for x in sums)


@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize(
    "case, kernel",
    [
        ("missing_barrier", "block_sum"),
        ("missing_syncwarp", "warp_exchange"),
        ("block_race", "every_block_writes"),
        ("block_race_after_barrier", "every_block_writes"),
    ],
)
def test_data_races_are_caught_in_every_order(planted, case, kernel, seed):
    result = planted("thread", case, seed)
    assert_caught(result, "data race", kernel, "planted.cu", "'block (")


def test_divergent_barrier_names_the_threads(planted):
    result = planted("plain", "divergent_barrier")
    assert_caught(
        result,
        "block (0,0,0): barrier deadlock: thread (0,0,0) waits at __syncthreads, "
        "which thread (3,0,0) never reaches: it returned",
    )


def test_partial_mask_is_refused(planted):
    assert_caught(planted("plain", "partial_mask"), "thread (0,0,0)", "partial mask")


@pytest.mark.parametrize(
    "case, words",
    [
        ("shared_index", "index 8 out of bounds for type 'float [8]'"),
        ("shared_pointer", "use-after-poison"),
        ("dynamic_overrun", "use-after-poison"),
        ("tail_overrun", "heap-buffer-overflow"),
        ("misaligned", "which requires 16 byte alignment"),
    ],
)
def test_wrong_addresses_are_caught(planted, case, words):
    assert_caught(planted("address", case), words)


def test_aligned_vectors_are_accepted(planted):
    assert numbers(planted("address", "aligned")) == [4, 35]


def test_conversions_equal_torch(tmp_path):
    """fp32 -> fp16 and bf16 and back, for halfway cases, subnormals, overflow and NaN."""
    program = build_program("plain", PLANTED.with_name("conversions.cu"), tmp_path / "conversions")
    bits = torch.arange(0, 2**32, 2**32 // 65536, dtype=torch.int64)
    bits = torch.cat([bits, bits + 0x1000, bits + 0x8000, bits + 0x7FFF, bits + 1])
    x = bits.to(torch.int32).view(torch.float32)
    result = subprocess.run([str(program)], input=x.numpy().tobytes(), capture_output=True)
    assert result.returncode == 0, result.stderr
    half, bfloat = torch.frombuffer(bytearray(result.stdout), dtype=torch.float32).view(-1, 2).T
    torch.testing.assert_close(half, x.half().float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloat, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_a_thread_without_barriers_is_cheap(planted):
    """A million CUDA threads: below 1 µs each, mostly 0.02 µs."""
    count, microseconds = numbers(planted("plain", "cost"))
    assert count == 4096 * 256
    assert microseconds < 1


def test_environment_loads_the_built_module(tmp_path):
    """Also where an editable install, or the folder python starts in, offers another one."""
    write_import_hook(tmp_path, tmp_path / "built.py")
    (tmp_path / "built.py").write_text("name = 'built'")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "vfengine_native.py").write_text("name = 'the wrong one'")
    result = subprocess.run(
        [sys.executable, "-c", "import vfengine_native; print(vfengine_native.name)"],
        env=environment("plain", tmp_path),
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "built", result.stderr


def test_build_says_what_failed(tmp_path):
    (tmp_path / "broken.cu").write_text("nonsense main() {}")
    with pytest.raises(RuntimeError, match=r"broken\.cu:1:1: error: .nonsense. does not name"):
        build_program("plain", tmp_path / "broken.cu", tmp_path / "broken")
