"""The Triton kernels of the ops that networks use, as compiled for a GPU (triton_tools).

Their values are tested in the interpreter, by tests/triton_kernels/test_triton_kernels.py.
"""

import itertools

import pytest
import test_model_input
import test_noise_estimate
import torch
from generator_cases import SHAPES
from kernel_cases import DTYPES, all_dtypes
from test_triton_kernels import ARCHITECTURES, VECTORS, assert_no_local_memory
from torch import Tensor
from triton_tools import Compiled, specialise

from vfengine.kernels import (
    attention,
    geglu,
    geglu_backward,
    group_norm_silu,
    group_norm_silu_backward,
    layer_norm,
    layer_norm_backward,
    model_input,
    noise_estimate,
    spatial_attention,
    temporal_attention,
    temporal_attention_backward,
)
from vfengine.ops.group_norm_silu import make_workspace

SHARED = 99 << 10  # bytes a block can have on the smallest of them, sm_120

all_architectures = pytest.mark.parametrize("arch", ARCHITECTURES)


def group_norm(
    dtype: torch.dtype, arch: int = 90, channels: int = 128, side: int = 32, of_second: int = 0
) -> list[Compiled]:
    """The kernels for 2 sets of 4 images of side x side with everything there is.

    of_second: channels of these that are in a second tensor
    """

    def picture(channels: int) -> Tensor:
        return torch.zeros(8, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)

    x, out = picture(channels - of_second), picture(channels)
    second = picture(of_second) if of_second else None
    tables = torch.zeros(channels), torch.zeros(channels)
    of_sets = torch.zeros(2, 2 * channels).chunk(2, 1)
    launches = group_norm_silu.launches(
        x, second, *tables, *of_sets, 4, 1e-5, 4, True, out, make_workspace(out, 4, 4)
    )
    return [
        specialise(kernel, *arguments, arch=arch, grid=grid, **constants)
        for kernel, grid, arguments, constants in launches
    ]


@all_dtypes
@all_architectures
@pytest.mark.parametrize("of_second", [0, 48])
def test_group_norm_moves_16_bytes_an_instruction(dtype, arch, of_second):
    channel, group, apply = group_norm(dtype, arch, of_second=of_second)
    tile = 4 * VECTORS[dtype.itemsize]  # of 4096 elements that 128 threads share
    assert channel.loads[16] >= tile
    assert channel.loads[2] <= 1  # of the chunk's first row
    assert apply.loads[16] >= tile
    assert apply.loads[2] == 0
    assert apply.stores == {16: tile}
    for compiled in (channel, group, apply):
        assert_no_local_memory(compiled, registers=168)


@all_dtypes
@all_architectures
@pytest.mark.parametrize("of_second", [0, 48])
def test_group_norm_of_small_sets_is_one_launch(dtype, arch, of_second):
    (slab,) = group_norm(dtype, arch, side=8, of_second=of_second)
    assert slab.loads[16] > 0
    assert slab.loads[2] <= 1  # of the group's first element
    assert slab.stores[16] == slab.stores.total() > 0
    assert_no_local_memory(slab, registers=168)


@all_dtypes
def test_group_norm_of_odd_channels_has_no_local_memory(dtype):
    sizes = itertools.product((32, 6), (0, 7))
    for compiled in itertools.chain(
        *(group_norm(dtype, channels=20, side=side, of_second=second) for side, second in sizes)
    ):
        assert_no_local_memory(compiled, registers=168)


@all_dtypes
@all_architectures
@pytest.mark.parametrize("channels", [112, 1280])
def test_layer_norm_moves_16_bytes_an_instruction(dtype, arch, channels):
    x = torch.zeros(4096, channels, dtype=dtype)
    tables = torch.zeros(channels), torch.zeros(channels)
    grid, arguments, constants = layer_norm.launch_arguments(x, *tables, 1e-5, x.clone())
    compiled = specialise(
        layer_norm.layer_norm_kernel, *arguments, arch=arch, grid=grid, **constants
    )
    assert compiled.stores[16] == compiled.stores.total() > 0
    assert compiled.loads[16] >= compiled.stores[16]  # of x, and for some of the tables
    assert compiled.loads[2] == 0
    assert_no_local_memory(compiled, registers=168)


@all_dtypes
@all_architectures
def test_geglu_moves_16_bytes_an_instruction(dtype, arch):
    x = torch.zeros(4096, 2 * 448, dtype=dtype)
    out = torch.zeros(4096, 448, dtype=dtype)
    grid, arguments, constants = geglu.launch_arguments(x, out)
    compiled = specialise(geglu.geglu_kernel, *arguments, arch=arch, grid=grid, **constants)
    vectors = VECTORS[dtype.itemsize]
    assert compiled.loads == {16: 2 * vectors}
    assert compiled.stores == {16: vectors}
    assert_no_local_memory(compiled, registers=64)


def compiled(launches: list[tuple], arch: int) -> list[Compiled]:
    return [
        specialise(kernel, *arguments, arch=arch, grid=grid, **constants)
        for kernel, grid, arguments, constants in launches
    ]


@all_dtypes
@all_architectures
def test_gradients_of_group_norm_move_16_bytes_an_instruction(dtype, arch):
    grad, x, out = (torch.zeros(8, 32, 32, 128, dtype=dtype).permute(0, 3, 1, 2) for _ in range(3))
    tables, of_images = torch.zeros(2, 128), torch.zeros(2, 8, 128)
    numbers = (4, 1e-5, 4, True)
    *_, sums, merge, apply = compiled(
        group_norm_silu_backward.launches(
            grad, x, *tables, *of_images, *numbers, out, torch.zeros(2, 8, 128)
        ),
        arch,
    )
    tile = 4 * VECTORS[dtype.itemsize]  # of 4096 elements that 128 threads share
    assert sums.loads[16] >= 2 * tile
    assert apply.loads[16] >= 2 * tile
    assert apply.stores == {16: tile}
    for kernel in (sums, merge, apply):
        assert kernel.loads[2] == 0
        assert_no_local_memory(kernel, registers=168)


@all_dtypes
@all_architectures
@pytest.mark.parametrize("channels", [112, 1280])
def test_gradients_of_layer_norm_move_16_bytes_an_instruction(dtype, arch, channels):
    grad, x, out = torch.zeros(3, 4096, channels, dtype=dtype)
    tables = torch.zeros(channels), 1e-5, out, torch.zeros(2, channels)
    norm, sums = compiled(layer_norm_backward.launches(grad, x, *tables), arch)
    assert norm.loads[16] >= 2 * VECTORS[dtype.itemsize]  # of x and grad, at the least
    assert norm.stores[16] > 0
    assert norm.loads[2] == norm.stores[2] == 0
    for kernel in (norm, sums):
        assert_no_local_memory(kernel, registers=168)


@all_dtypes
@all_architectures
def test_gradient_of_geglu_moves_16_bytes_an_instruction(dtype, arch):
    grad = torch.zeros(4096, 448, dtype=dtype)
    x, out = torch.zeros(2, 4096, 2 * 448, dtype=dtype)
    grid, arguments, constants = geglu_backward.launch_arguments(grad, x, out)
    kernel = geglu_backward.geglu_backward_kernel
    (kernel,) = compiled([(kernel, grid, arguments, constants)], arch)
    vectors = VECTORS[dtype.itemsize]
    assert kernel.loads == {16: 3 * vectors}
    assert kernel.stores == {16: 2 * vectors}
    assert_no_local_memory(kernel, registers=64)


@all_dtypes
@all_architectures
@pytest.mark.parametrize(("frames", "head_dim"), [(16, 16), (16, 64), (64, 128), (128, 256)])
def test_gradients_of_temporal_attention_fit(dtype, arch, frames, head_dim):
    qkv, out = torch.zeros(2, 1, frames, 64, 3 * 2 * head_dim, dtype=dtype)
    grad = torch.zeros(1, frames, 64, 2 * head_dim, dtype=dtype)
    bias, grad_bias = torch.zeros(2, 2, frames, frames)
    launches = temporal_attention_backward.launches(grad, qkv, bias, 2, out, grad_bias)
    for kernel in compiled(launches, arch):
        assert kernel.shared <= SHARED
        assert kernel.loads[16] + kernel.loads[8] > 0
        assert kernel.loads[2] == kernel.stores[2] == 0
        # Wide heads in fp32 leave a few addresses on the stack, which ptxas spills.
        assert kernel.usage["LOCAL"] == 0
        assert kernel.usage["STACK"] <= 32


def temporal(dtype: torch.dtype, arch: int, frames: int, head_dim: int) -> Compiled:
    qkv = torch.zeros(1, frames, 64, 3 * 2 * head_dim, dtype=dtype)
    out = torch.zeros(1, frames, 64, 2 * head_dim, dtype=dtype)
    bias = torch.zeros(2, frames, frames)
    grid, arguments, constants = temporal_attention.launch_arguments(qkv, bias, 2, out)
    return specialise(attention.attention_kernel, *arguments, arch=arch, grid=grid, **constants)


@all_dtypes
@all_architectures
@pytest.mark.parametrize(("frames", "head_dim"), [(16, 16), (16, 64), (64, 128), (128, 256)])
def test_temporal_attention_fits_and_moves_16_bytes_an_instruction(dtype, arch, frames, head_dim):
    compiled = temporal(dtype, arch, frames, head_dim)
    assert compiled.shared <= SHARED
    # Keys come by asynchronous copies where they are pipelined, which are no ld.global.
    assert compiled.loads[16] > 0
    assert compiled.loads[2] == 0
    assert compiled.usage["LOCAL"] == compiled.usage["STACK"] == 0


@pytest.mark.parametrize("dtype", [DTYPES["fp16"], DTYPES["bf16"]], ids=["fp16", "bf16"])
@all_architectures
def test_products_of_16_bits_run_on_tensor_cores(dtype, arch):
    compiled = temporal(dtype, arch, 16, 64)
    products = r"mma.sync", r"wgmma", r"tcgen05.mma"
    assert any(name in compiled.asm["ptx"] for name in products)


def test_products_of_fp32_are_not_rounded_to_tf32():
    assert "tf32" not in temporal(torch.float32, 90, 16, 64).asm["ptx"]


@all_dtypes
@all_architectures
def test_spatial_attention_fits(dtype, arch):
    q, k = torch.zeros(2, 4096, 3 * 160, dtype=dtype), torch.zeros(2, 77, 2 * 160, dtype=dtype)
    out = torch.zeros(2, 4096, 160, dtype=dtype)
    arguments = (q[..., :160], k[..., :160], k[..., 160:], 1, out)
    grid, values, constants = spatial_attention.launch_arguments(*arguments)
    compiled = specialise(attention.attention_kernel, *values, arch=arch, grid=grid, **constants)
    assert compiled.shared <= SHARED
    assert compiled.usage["LOCAL"] == compiled.usage["STACK"] == 0


@all_dtypes
@all_architectures
def test_model_input_moves_the_most_that_a_patch_has(dtype, arch):
    """Four pixels, as many as lie beside one another in patches of 4; rows 16 bytes at a time."""
    case = test_model_input.make_case(SHAPES["residual"], dtype)
    grid, arguments, constants = model_input.launch_arguments(
        *(case[name] for name in ("z", "coeffs", "step", "conditioned", "out"))
    )
    kernel = model_input.model_input_kernel
    compiled = specialise(kernel, *arguments, arch=arch, grid=grid, **constants)
    assert compiled.stores == {16: 2}  # a guided batch is written twice
    assert compiled.loads[4 * dtype.itemsize] == 4  # the frame and its base frame
    assert_no_local_memory(compiled, registers=64)


@all_dtypes
@all_architectures
@pytest.mark.parametrize("name", ["base", "residual", "many"])
def test_noise_estimate_holds_its_pixels_in_registers(dtype, arch, name):
    case = test_noise_estimate.make_case(SHAPES[name], dtype)
    names = ("z", "rows", "coeffs", "step", "guidance_scale", "z")
    grid, arguments, constants = noise_estimate.launch_arguments(*(case[name] for name in names))
    kernel = noise_estimate.noise_estimate_kernel
    compiled = specialise(kernel, *arguments, arch=arch, grid=grid, **constants)
    pixels = constants["BLOCK"] // 128
    assert compiled.stores.total() <= 3 * pixels
    assert_no_local_memory(compiled, registers=64)
