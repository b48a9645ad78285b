"""The machine code of amx gives the bits of amx_emulated: on any x86-64 CPU, its tiles emulated."""

import platform
import subprocess
from pathlib import Path

import pytest

from vfengine.native import vfengine_native

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tests" / "tools" / "amx"
SOURCES = ("gemm/row_matmul", "spatial_attention", "temporal_attention")
VECTORS = {  # what both are built with beside their tiles
    "sse2": [],
    "avx512_bf16": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"],
}
TILES = {"amx": ["-mamx-tile", "-mamx-bf16"], "amx_emulated": ["-DVF_EMULATED_TILES"]}
OPTIONS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", f"-I{ROOT / 'csrc'}"]


def compile_program(folder: Path, vectors: str) -> Path:
    objects = []
    for isa, tiles in TILES.items():
        for source in SOURCES:
            objects.append(folder / f"{isa}-{Path(source).name}.o")
            flags = [*OPTIONS, *VECTORS[vectors], *tiles, f"-DVF_ISA={isa}"]
            file = ROOT / "csrc" / "cpu" / f"{source}.cpp"
            subprocess.run(["g++", *flags, "-c", file, "-o", objects[-1]], check=True)
    program, shared = folder / "run", [TOOLS / "run.cpp", ROOT / "csrc" / "cpu" / "team.cpp"]
    subprocess.run(["g++", *OPTIONS, *shared, *objects, "-o", program], check=True)
    return program


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is a part of x86-64")
@pytest.mark.parametrize("vectors", ["sse2", *({"avx512_bf16"} & set(vfengine_native.cpu_isas))])
def test_tiles_of_amx_give_the_bits_of_the_emulated_ones(vectors, tmp_path):
    program = compile_program(tmp_path, vectors)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("38 cases")
