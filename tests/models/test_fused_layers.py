"""The layers' fused path, which inference on CUDA takes, against their plain one, on the CPU.

vfengine/ops run on CPU tensors too, so the tests make `fused` return true there. Tests on fake CUDA
tensors show when it does so by itself.
"""

from dataclasses import replace

import fake_cuda
import pytest
import torch
from conftest import tiny_config
from test_models import RGB, normal, randomise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vfengine.models import UNet, layers
from vfengine.models.layers import (
    Attention,
    Conv2d,
    FeedForward,
    GroupNorm,
    LayerNorm,
    ResBlock,
    TemporalConv,
    Transformer,
    fused,
)
from vfengine.ops.temporal_attention import MAX_FRAMES

IMAGE, CLIP = replace(tiny_config().base, **RGB), replace(tiny_config().residual, **RGB)
GROUP_NORM, LAYER_NORM, GEGLU, TEMPORAL = (
    f"vfengine.{op}.default"
    for op in ("group_norm_silu", "layer_norm", "geglu", "temporal_attention")
)
FRAMES = 4


def picture(channels: int, frames: int = FRAMES) -> Tensor:
    """Two clips [2*N, C, 4, 3], off zero as activations are."""
    x = normal(2 * frames, channels, 4, 3) + 0.5
    return x.contiguous(memory_format=torch.channels_last)


def res_block(scale_shift: bool, out_channels: int = 16):
    return ResBlock(16, out_channels, 24, 4, scale_shift), (picture(16), normal(2 * FRAMES, 24))


def temporal(head_dim: int = 8, frames: int = FRAMES, depth: int = 1, **changes):
    config = replace(CLIP, head_dim=8, **changes)
    layer = Transformer(24, "time", config, head_dim, depth=depth)
    return layer, (picture(24, frames), frames)


def spatial(context: bool, depth: int = 1):
    config = replace(IMAGE, context_dim=20 if context else None)
    given = (normal(2 * FRAMES, 5, 20),) if context else ()
    return Transformer(16, "space", config, 8, depth=depth), (picture(16), FRAMES, *given)


def unet(config, **conditions):
    shape = (2, FRAMES, 3, 16, 16) if config.is_video else (2, 3, 16, 16)
    layer = UNet(config)
    return layer, (normal(*shape), torch.tensor([3, 900]), *conditions.values())


EVERYTHING = replace(
    CLIP,
    temporal_conv=(True, True),
    temporal_conv_depth=2,
    temporal_self_attentions=2,
    norm_over_frames=True,
    scale_shift=False,
    context_dim=20,
    transformer_in_heads=3,
    transformer_depths=(1, 2),
    feed_forward_mult=4,
)
# A module with its arguments, and the ops that it calls, in order (None: too many to list):
PAIR = [GROUP_NORM] * 2
CASES = {
    "residual block, scale and shift": (lambda: res_block(True), PAIR),
    "residual block, shift": (lambda: res_block(False), PAIR),
    "residual block, shortcut": (lambda: res_block(True, 24), PAIR),
    "temporal convolution": (
        lambda: (TemporalConv(16, 4, 3), (picture(16), FRAMES)),
        [GROUP_NORM] * 3,
    ),
    "one frame": (lambda: (TemporalConv(16, 4, 1), (picture(16, 1), 1)), [GROUP_NORM]),
    "spatial": (lambda: spatial(False), [GROUP_NORM, LAYER_NORM, LAYER_NORM, GEGLU]),
    "spatial, context": (
        lambda: spatial(True, depth=2),
        [GROUP_NORM, *[LAYER_NORM, LAYER_NORM, LAYER_NORM, GEGLU] * 2],
    ),
    "temporal": (temporal, [GROUP_NORM, LAYER_NORM, TEMPORAL, LAYER_NORM, GEGLU]),
    "temporal, one frame": (
        lambda: temporal(frames=1),
        [GROUP_NORM, LAYER_NORM, TEMPORAL, LAYER_NORM, GEGLU],
    ),
    "temporal, no bias, no feed-forward": (
        lambda: temporal(position_buckets=0, feed_forward_mult=0),
        [GROUP_NORM, LAYER_NORM, TEMPORAL],
    ),
    "temporal, twice, norm over frames": (
        lambda: temporal(temporal_self_attentions=2, norm_over_frames=True, depth=2),
        [GROUP_NORM, *[LAYER_NORM, TEMPORAL, LAYER_NORM, TEMPORAL, LAYER_NORM, GEGLU] * 2],
    ),
    "temporal, heads of 12": (
        lambda: temporal(head_dim=12, temporal_self_attentions=2),
        [GROUP_NORM, LAYER_NORM, LAYER_NORM, LAYER_NORM, GEGLU],
    ),
    "temporal, many frames": (
        lambda: temporal(frames=MAX_FRAMES + 1),
        [GROUP_NORM, LAYER_NORM, LAYER_NORM, GEGLU],
    ),
    "temporal, most frames": (
        lambda: temporal(frames=MAX_FRAMES),
        [GROUP_NORM, LAYER_NORM, TEMPORAL, LAYER_NORM, GEGLU],
    ),
    "image network": (lambda: unet(IMAGE), None),
    "video network": (lambda: unet(CLIP), None),
    "video network, everything": (lambda: unet(EVERYTHING, context=normal(2, 5, 20)), None),
}
PLAIN = ("aten.native_group_norm", "aten.native_layer_norm", "aten.gelu")


def make(case: str, dtype: torch.dtype = torch.float32):
    layer, arguments = CASES[case][0]()
    layer = randomise(layer).requires_grad_(False).to(dtype)
    return layer, cast(arguments, dtype)


def cast(arguments, dtype: torch.dtype) -> list:
    return [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]


def ops_of(call) -> list[str]:
    """The ops that a call dispatches: ours, and those of torch that ours replace."""
    with fake_cuda.Audit() as audit:
        call()
    return [op for op in audit.ops if op.startswith(("vfengine.", *PLAIN))]


def distance(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.fixture
def everywhere(monkeypatch):
    return lambda: monkeypatch.setattr(layers, "fused", lambda x, module, *more: True)


@pytest.mark.parametrize("case", CASES)
def test_fused_path_computes_the_same(case, everywhere):
    layer, arguments = make(case)
    expected = layer(*arguments)
    everywhere()
    out = layer(*arguments)
    assert out.dtype == expected.dtype
    assert out.shape == expected.shape
    assert distance(out, expected.double()) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_fused_path_is_as_exact_in_bf16(case, everywhere):
    layer, arguments = make(case, torch.bfloat16)
    plain = layer(*arguments)
    everywhere()
    out = layer(*arguments)
    assert out.dtype == plain.dtype == torch.bfloat16
    exact = layer.float()(*cast(arguments, torch.float32)).double()
    assert distance(out, exact) <= 1.5 * distance(plain, exact)


@pytest.mark.parametrize("case", CASES)
def test_fused_path_calls_the_ops_and_keeps_the_layout(case, everywhere):
    layer, arguments = make(case)
    expected = CASES[case][1]
    strides = layer(*arguments).stride()
    assert not any(op.startswith("vfengine.") for op in ops_of(lambda: layer(*arguments)))
    everywhere()
    ops = ops_of(lambda: layer(*arguments))
    assert not any(op.startswith(PLAIN) for op in ops)
    assert set(ops) >= {GROUP_NORM} if expected is None else ops == expected
    assert layer(*arguments).stride() == strides


def test_frames_are_not_permuted(everywhere):
    """One matrix product makes q, k, v without a copy: only weights and bias are concatenated."""
    layer, arguments = make("temporal")
    everywhere()
    with fake_cuda.Audit() as audit:
        layer(*arguments)
    products = sum(op.startswith(("aten.mm", "aten.addmm")) for op in audit.ops)
    assert products == 6  # in, q k v, out, feed-forward's two, out
    assert audit.ops.count("aten.clone.default") == 1  # of the position bias
    assert "aten.copy_.default" not in audit.ops


# -- when ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake_gpu(tmp_path_factory):
    remove = fake_cuda.install(tmp_path_factory.mktemp("fake_cuda"))
    yield
    remove()


def on_fake_gpu(layer: nn.Module, arguments):
    mode, memo = FakeTensorMode(), {}
    fake_cuda.to_fake_cuda(layer, mode, memo)
    with mode:
        tensors = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            if isinstance(x, Tensor)
            else x
            for x in arguments
        ]
    return mode, tensors


@pytest.mark.parametrize("case", CASES)
def test_cuda_takes_the_fused_path(case, fake_gpu):
    """By itself, without a wait or a host copy, the same ops at every call."""
    layer, arguments = make(case, torch.bfloat16)
    _, tensors = on_fake_gpu(layer, arguments)
    buffers = {str(k): x for k, x in enumerate(tensors) if isinstance(x, Tensor)}
    report = fake_cuda.audit(lambda: layer(*tensors), buffers)
    assert report.clean, report
    ours = [op for op in report.ops[0] if op.startswith("vfengine.")]
    assert ours == CASES[case][1] or (CASES[case][1] is None and set(ours) >= {GROUP_NORM})
    assert not any(op.startswith(PLAIN) for op in report.ops[0])


@pytest.mark.parametrize("case", ["temporal", "video network"])
@pytest.mark.parametrize("how", ["training", "weights", "input"])
def test_cuda_takes_the_plain_path_where_a_gradient_may_be_recorded(case, how, fake_gpu):
    layer, arguments = make(case)
    mode, tensors = on_fake_gpu(layer, arguments)
    if how == "input":
        tensors[0].requires_grad_(True)
    elif how == "weights":
        layer.requires_grad_(True)
    else:
        layer.train()

    def ours() -> bool:
        with mode:
            return any(op.startswith("vfengine.") for op in ops_of(lambda: layer(*tensors)))

    assert not ours()
    with torch.no_grad():
        assert ours() is (how != "training")


@pytest.mark.parametrize("kind", [GroupNorm, LayerNorm, FeedForward, Attention])
def test_fused_is_for_cuda_outside_of_tracing(kind, fake_gpu, monkeypatch):
    sizes = {GroupNorm: (4, 16), LayerNorm: (16,), FeedForward: (16, 2), Attention: (16, 8)}[kind]
    layer = kind(*sizes).requires_grad_(False).eval()
    with FakeTensorMode():
        x, wide = (
            torch.empty(2, 16, device="cuda", dtype=d) for d in (torch.float16, torch.float64)
        )
    assert fused(x, layer)
    assert not fused(wide, layer)
    assert not fused(torch.empty(2, 16), layer)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert not fused(x, layer)
    finally:
        torch.set_autocast_enabled("cuda", False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fused(x, layer)


# -- convolutions ----------------------------------------------------------------------------------

_ALLOW_TF32 = -1  # place among the arguments of aten::_convolution


def convolutions(layer: nn.Module, x: Tensor) -> list[tuple]:
    """The convolutions that layer(x) asks torch for: their ops and arguments."""
    seen = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if "conv" in str(op):
                seen.append((str(op), args))
            return op(*args, **(kwargs or {}))

    with Calls():
        layer(x)
    return seen


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_fp32_convolutions_are_as_exact_as_products(precision, fake_gpu):
    """On CUDA, where torch by itself would round theirs to TF32 and leave those of matrices."""
    with FakeTensorMode(), torch.inference_mode():
        layer = Conv2d(8, 8, 3, padding=1, device="cuda").eval()
        x = torch.empty(1, 8, 4, 4, device="cuda")
        torch.set_float32_matmul_precision(precision)
        try:
            ((op, arguments),) = convolutions(layer, x)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert op == "aten._convolution.default"
    assert arguments[_ALLOW_TF32] is (precision == "high")


def test_convolutions_of_other_dtypes_and_of_training_are_torchs(fake_gpu):
    with FakeTensorMode():
        layer = Conv2d(8, 8, 3, padding=1, device="cuda")
        x = torch.empty(1, 8, 4, 4, device="cuda")
        assert all("_convolution" not in op for op, _ in convolutions(layer, x))
        with torch.inference_mode():
            half = Conv2d(8, 8, 3, padding=1, device="cuda", dtype=torch.bfloat16).eval()
            assert all("_convolution" not in op for op, _ in convolutions(half, x.bfloat16()))


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"kernel_size": (3, 1), "padding": (1, 0)}])
def test_fp32_convolution_is_the_plain_one(options, monkeypatch):
    layer = randomise(Conv2d(6, 10, **{"kernel_size": 3, "padding": 1, **options}).eval())
    x = picture(6)
    with torch.inference_mode():
        expected = nn.Conv2d.forward(layer, x)
        monkeypatch.setattr(layers, "fused", lambda *_: True)
        assert torch.equal(layer(x), expected)


def test_tf32_of_products_can_be_read_however_it_was_set():
    products = torch.backends.cuda.matmul
    assert not layers.matmul_in_tf32()
    torch.set_float32_matmul_precision("medium")
    assert layers.matmul_in_tf32()
    torch.set_float32_matmul_precision("highest")
    if hasattr(products, "fp32_precision"):  # torch 2.9 and later; not to be read the old way then
        former = products.fp32_precision
        products.fp32_precision = "tf32"
        assert layers.matmul_in_tf32()
        products.fp32_precision = former
    assert not layers.matmul_in_tf32()
