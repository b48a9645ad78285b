"""The kernels of implicit_gemm without a GPU: every tile by value, and as compiled for one."""

import re

import pytest
import torch
from kernel_cases import DTYPES, all_dtypes
from test_triton_kernels import ARCHITECTURES, assert_no_local_memory
from triton_tools import Compiled, interpret, specialise
from vfengine.kernels.gemm_tiles import FP32_TILES, GATED_TILES, TILES

from vfengine.kernels import gemm_terms, gemm_tiles, implicit_gemm
from vfengine.ops.implicit_gemm import Product

HALF = torch.bfloat16
every_tile = pytest.mark.parametrize("tile", TILES, ids=str)


def product(dtype=HALF, size=(16, 64, 64), channels=256, columns=256, taps=3, **terms) -> Product:
    """A convolution with bias, shift and residual unless `terms` say otherwise."""
    gated = terms.pop("gated", False)
    x = torch.empty(*size, channels, dtype=dtype)
    out = torch.empty(*size, columns, dtype=dtype)
    weight = torch.empty(columns * (1 + gated), taps, taps, channels, dtype=dtype)
    everything = {
        "second": None,
        "stride": 1,
        "padding": (taps // 2, taps // 2),
        "upsample": 1,
        "bias": torch.empty(len(weight)),
        "shift": torch.empty(size[0], columns),
        "residual": out,
        "coefficients": None,
        "silu": False,
    }
    return Product(x, weight, **{**everything, **terms}, gated=gated, out=out)


def compiled(of: Product, tile: gemm_tiles.Tile, arch: int = 90) -> Compiled:
    grid, arguments, constants = implicit_gemm.launch_arguments(
        of, tile, *implicit_gemm.workspace(of, tile)
    )
    return specialise(
        implicit_gemm.implicit_gemm_kernel, *arguments, arch=arch, grid=grid, **constants
    )


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "bf16"])
def test_every_tile_in_the_interpreter(dtype):
    """And that the tickets are zero again, for the next launch."""
    name = {value: name for name, value in DTYPES.items()}[dtype]
    interpret(f"""
import pytest
from triton_tools import compute_bf16_correctly
from test_implicit_gemm import run_tiles
from kernel_cases import DTYPES
from vfengine.kernels import implicit_gemm
compute_bf16_correctly()
with pytest.MonkeyPatch.context() as patch:
    run_tiles("cpu", patch, DTYPES[{name!r}])
(tickets,) = implicit_gemm._kept.values()
assert not tickets.any()
""")


def test_terms_after_products_of_torch_in_the_interpreter():
    interpret("""
from triton_tools import compute_bf16_correctly
from test_implicit_gemm import run_torch
compute_bf16_correctly()
run_torch("cpu")
""")


@every_tile
def test_operands_come_by_16_byte_copies_while_tensor_cores_multiply(tile):
    code = compiled(product(), tile)
    ptx = code.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    assert set(copies) == {"0x10"}
    assert ("wgmma.mma_async" in ptx) == (tile.m >= 64)
    assert ("mma.sync" in ptx) == (tile.m < 64)
    if tile.m >= 64:  # products of one step are under way while the next one's copies begin
        assert re.search(r"wgmma\.wait_group\.sync\.aligned\s+1;", ptx)
    assert code.waits_first
    assert code.stores[16] >= code.stores.total() - 1  # but for the ticket
    assert_no_local_memory(code, registers=255 if tile.warps == 4 else 232)


@pytest.mark.parametrize("tile", GATED_TILES, ids=str)
def test_gated_tiles_stay_in_registers(tile):
    code = compiled(product(taps=1, gated=True, shift=None, residual=None), tile)
    assert_no_local_memory(code, registers=232)


@every_tile
def test_tiles_of_normalised_operands_stay_in_registers(tile):
    of = product(coefficients=torch.empty(16, 256, 2), silu=True)
    if gemm_tiles.fits(tile, of.size):
        assert_no_local_memory(compiled(of, tile), registers=255)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tile", FP32_TILES, ids=str)
def test_products_of_fp32_are_exact(tile, gated):
    code = compiled(product(torch.float32, taps=1, gated=gated), tile)
    assert "tf32" not in code.asm["ptx"]
    assert "mma" not in code.asm["ptx"]
    assert_no_local_memory(code, registers=255)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensor_cores_of_every_architecture(arch):
    code = compiled(product(), TILES[3], arch)
    assert any(name in code.asm["ptx"] for name in ("mma.sync", "wgmma", "tcgen05.mma"))
    assert code.shared <= 99 << 10
    assert code.usage["LOCAL"] == code.usage["STACK"] == 0


@pytest.mark.parametrize("tile", [*TILES, *GATED_TILES], ids=str)
def test_shared_memory_is_as_foreseen(tile):
    gated = tile in GATED_TILES
    assert compiled(product(taps=1, gated=gated), tile).shared <= tile.shared(2, gated)


def test_channels_that_are_no_whole_vectors_build():
    for channels, columns in ((20, 11), (1, 1)):
        compiled(product(channels=channels, columns=columns, taps=1), TILES[3])


def test_terms_move_16_bytes_an_instruction():
    of = product()
    grid, arguments, constants = gemm_terms.launch_arguments(of, of.out.clone())
    code = specialise(gemm_terms.add_terms_kernel, *arguments, grid=grid, **constants)
    assert code.stores == {16: 2}
    assert code.loads[16] >= 4  # y and residual
    assert_no_local_memory(code, registers=128)


@all_dtypes
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 8, 8), (16, 8, 8), (1, 32, 32), (16, 64, 64)])
def test_cuts_of_k(dtype, gated, size):
    """No run is empty, tickets are enough, and few tiles are cut into many runs."""
    of = product(dtype, size, channels=512, columns=512, taps=1 if gated else 3, gated=gated)
    tiles = gemm_tiles.tiles_for(of.size)
    assert 0 < len(tiles) <= gemm_tiles.CANDIDATES
    for tile in tiles:
        splits, steps = gemm_tiles.splits_of(tile, of.size), gemm_tiles.step_count(tile, of.size)
        count = gemm_tiles.tile_count(tile, of.size)
        assert (splits - 1) * -(-steps // splits) < steps
        assert splits == 1 or count * splits <= gemm_tiles.MOST_TICKETS
    if size == (1, 8, 8) and not gated:
        assert gemm_tiles.splits_of(tiles[0], of) >= 4


def test_large_products_take_large_tiles():
    assert gemm_tiles.tiles_for(product().size)[0] is TILES[0]
    assert gemm_tiles.tiles_for(product(size=(1, 1, 1), taps=1).size)[0].m == 16
