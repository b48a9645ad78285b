"""Attention: every backend against the formula, what "auto" chooses, and what is refused.

flash-attn needs a GPU to be installed: a stand-in of its name takes its place here, which holds
vfengine to the package's layout and computes in plain PyTorch. The package itself has never run.
"""

import functools
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

import fake_cuda
import pytest
import torch
import torch.nn.functional as F
from fake_cuda import audit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vfengine.ops import attention
from vfengine.ops.attention import attend, choose_backend

VARIABLE = "VFENGINE_ATTENTION_BACKEND"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Each as q's shape and the number of keys M:
SHAPES = {
    "spatial": ((2, 4, 80, 32), 80),
    "context": ((2, 4, 80, 32), 7),
    "temporal": ((2, 5, 4, 16, 32), 16),  # [B, H*W, heads, N, D]
    "long temporal": ((1, 3, 2, 70, 8), 70),
    "odd": ((3, 2, 5, 40), 67),
    "no batch": ((2, 9, 16), 9),
    "one": ((1, 1, 1, 8), 1),
}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Without the variable, without flash-attn, and without a cached choice."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def fake_gpu(tmp_path_factory):
    remove = fake_cuda.install(tmp_path_factory.mktemp("fake_cuda"))
    yield
    remove()


@pytest.fixture
def flash_calls(monkeypatch) -> list[tuple[Tensor, ...]]:
    """Installs the stand-in, on a GPU of capability 8.0; returns what it is called with."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, *, deterministic=False):
        calls.append((q, k, v))
        assert dropout_p == 0.0
        assert softmax_scale is None
        assert deterministic is torch.are_deterministic_algorithms_enabled()
        batch, _, heads, dim = q.shape  # [B, L, H, D]
        assert k.shape == v.shape == (batch, k.shape[1], heads, dim)
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        out = formula(*(x.transpose(1, 2).float() for x in (q, k, v)))
        return out.to(q.dtype).transpose(1, 2).contiguous()  # as the package: a new [B, L, H, D]

    install(monkeypatch, flash_attn_func=flash_attn_func)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return calls


def install(monkeypatch, **functions: Callable) -> None:
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    forget()


def forget() -> None:
    attention._flash_installed.cache_clear()
    attention._flash_attn_func.cache_clear()


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Every operation in the dtype of its operands."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias.to(q.dtype)).softmax(-1) @ v


def inputs(shape, keys, dtype, *, biased=False, device="cpu", seed=0) -> list[Tensor | None]:
    """q, k, v as `Attention` makes them, views of rows [..., L, H * D], and a bias or None."""
    generator = torch.Generator().manual_seed(seed)
    *batch, heads, length, dim = shape
    tensors = [
        torch.randn(*batch, rows, heads, dim, generator=generator).to(device, dtype)
        for rows in (length, keys, keys)
    ]
    bias = torch.randn(heads, length, keys, generator=generator).to(device, dtype)
    return [x.transpose(-3, -2) for x in tensors] + [bias if biased else None]


def check_accuracy(out: Tensor, arguments: list[Tensor | None], peer: Tensor | None = None) -> None:
    """Against fp64: at most twice the error of `peer`, by default the formula in the same dtype."""
    exact = formula(*(None if x is None else x.double() for x in arguments))
    assert out.shape == exact.shape
    assert out.dtype == arguments[0].dtype
    error = (out.double() - exact).abs().max()
    plain = ((formula(*arguments) if peer is None else peer).double() - exact).abs().max()
    spacing = torch.finfo(out.dtype).eps * exact.abs().max()
    assert float(error) <= 2 * max(float(plain), float(spacing))


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_matches_formula(shape, dtype, biased, backend):
    arguments = inputs(*SHAPES[shape], dtype, biased=biased)
    check_accuracy(attend(*arguments, backend=backend), arguments)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_matches_formula(shape, dtype, flash_calls, monkeypatch):
    monkeypatch.setattr(attention, "why_no_flash", lambda q, k, v, bias: None)  # on the CPU
    arguments = inputs(*SHAPES[shape], dtype)
    out = attend(*arguments, backend="flash")
    check_accuracy(out, arguments)
    assert out.transpose(-3, -2).is_contiguous()  # rows again
    addresses = [x.data_ptr() for x in arguments[:3]]
    assert [[x.data_ptr() for x in call] for call in flash_calls] == [addresses]  # no copies


def test_flash_is_told_of_deterministic_algorithms(flash_calls, monkeypatch):
    monkeypatch.setattr(attention, "why_no_flash", lambda q, k, v, bias: None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    attend(*inputs((1, 1, 2, 8), 2, torch.float16), backend="flash")  # the stand-in looks
    assert len(flash_calls) == 1


@pytest.mark.parametrize("keys", [1, 16, 64, 65, 80])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_auto_on_cpu_keeps_the_bits_of_earlier_releases(batch, dtype, biased, keys, flash_calls):
    def earlier(q, k, v, bias):
        if k.shape[-2] > 64:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=None if bias is None else bias.to(q.dtype)
            )
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias
        return logits.float().softmax(-1).to(v.dtype) @ v

    q, k, v, bias = inputs((*batch, 4, 24, 32), keys, dtype, biased=biased)
    bias = None if bias is None else bias.float()  # a parameter under autocast
    assert torch.equal(attend(q, k, v, bias), earlier(q, k, v, bias))
    assert not flash_calls


# -- choices ---------------------------------------------------------------------------------------

SHORT, LONG = ((2, 4, 16, 32), 16), ((2, 4, 80, 32), 80)
half = functools.partial(inputs, dtype=torch.float16)
ON_CUDA: dict[str, tuple[Callable, str]] = {  # with flash-attn installed
    "long": (lambda: half(*LONG), "flash"),
    "short": (lambda: half(*SHORT), "flash"),
    "bf16": (lambda: inputs(*LONG, torch.bfloat16), "flash"),
    "temporal": (lambda: half((2, 5, 4, 16, 32), 16), "flash"),
    "largest head": (lambda: half((1, 1, 80, 256), 80), "flash"),
    "fp32": (lambda: inputs(*LONG, torch.float32), "sdpa"),
    "short, fp32": (lambda: inputs(*SHORT, torch.float32), "sdpa"),
    "bias": (lambda: half(*LONG, biased=True), "sdpa"),
    "short, bias": (lambda: half(*SHORT, biased=True), "sdpa"),
    "head too large": (lambda: half((1, 1, 80, 264), 80), "sdpa"),
    "head of 12": (lambda: half((1, 1, 80, 12), 80), "sdpa"),
    "batch of none": (lambda: half((0, 1, 80, 8), 80), "sdpa"),
    "largest batch": (lambda: half((5, 13107, 1, 1, 8), 1), "flash"),
    "batch too large": (lambda: half((65536, 1, 1, 8), 1), "math"),
    "keys of one for all": (
        lambda: [half(*LONG)[0]] + [x[:1] for x in half(*LONG)[1:3]] + [None],
        "sdpa",
    ),
    "values of one for all": (lambda: half(*LONG)[:2] + [half(*LONG)[2][:1], None], "sdpa"),
    "two dtypes": (lambda: half(*LONG)[:2] + inputs(*LONG, torch.float32)[2:], "sdpa"),
}


@pytest.mark.parametrize("case", ON_CUDA)
def test_auto_on_cuda(case, fake_gpu, flash_calls):
    make, expected = ON_CUDA[case]
    assert choose_backend(*on_fake_gpu(make()), "auto") == expected


@pytest.mark.parametrize("capability, expected", [((7, 5), "sdpa"), ((9, 0), "flash")])
def test_auto_asks_for_the_capability(capability, expected, fake_gpu, flash_calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_backend(*on_fake_gpu(half(*LONG)), "auto") == expected


@pytest.mark.parametrize("shape", [LONG, SHORT])
def test_auto_without_flash_attn(shape, fake_gpu):
    assert choose_backend(*on_fake_gpu(half(*shape)), "auto") == "sdpa"


@pytest.mark.parametrize("name, expected", [("sdpa", "sdpa"), ("math", "math"), ("auto", "math")])
def test_variable_decides_for_auto_alone(name, expected, monkeypatch):
    arguments = inputs(*SHORT, torch.float32)
    for value in ("sdpa", name):  # read at every call
        monkeypatch.setenv(VARIABLE, value)
        choose_backend(*arguments, "auto")
    assert choose_backend(*arguments, "auto") == expected
    assert choose_backend(*arguments, "math") == "math"
    monkeypatch.setenv(VARIABLE, "")
    assert choose_backend(*arguments, "auto") == "math"


@pytest.mark.parametrize("keys, expected", [(80, "math"), (1024, "math"), (1025, "sdpa")])
def test_auto_on_cpu_writes_training_out(keys, expected):
    q, k, v, _ = inputs((1, 2, 24, 8), keys, torch.float32)
    assert choose_backend(q.requires_grad_(), k, v, None, "auto") == expected
    with torch.no_grad():
        assert choose_backend(q * 1, k, v, None, "auto") == "sdpa"


def test_gradients_in_bf16_are_closer_than_those_of_the_formula_in_bf16():
    given = [x.requires_grad_() for x in inputs((2, 4, 80, 32), 80, torch.bfloat16)[:3]]
    exact = [x.detach().double().requires_grad_() for x in given]

    def gradients(run, tensors):
        return torch.autograd.grad(run(*tensors).square().sum(), tensors)

    expected = gradients(formula, exact)
    ours, plain = (
        [float((got - x).norm()) for got, x in zip(gradients(run, given), expected, strict=True)]
        for run in (attend, formula)
    )
    assert all(a <= b for a, b in zip(ours, plain, strict=True)), (ours, plain)


def on_fake_gpu(tensors: list[Tensor | None]) -> list[Tensor | None]:
    with FakeTensorMode():
        return [
            None
            if x is None
            else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            for x in tensors
        ]


# -- refusals --------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable, str]] = {  # by "flash", on a GPU with flash-attn
    "fp32": (lambda: inputs(*LONG, torch.float32), "bfloat16, got torch.float32"),
    "bias": (lambda: half(*LONG, biased=True), r"takes no bias, got one of \[4, 80, 80\]"),
    "head": (lambda: half((1, 1, 80, 12), 80), "multiples of 8, at most 256, got 12"),
    "batch": (lambda: half((65536, 1, 1, 8), 1), "batch of 1 to 65535, got 65536"),
    "keys of one for all": (ON_CUDA["keys of one for all"][0], r"dimensions, got \[2, 4\], \[1, 4"),
    "two dtypes": (ON_CUDA["two dtypes"][0], "of one dtype, got torch.float16, torch.float16, tor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_flash_rejects(case, fake_gpu, flash_calls):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        attend(*on_fake_gpu(make()), backend="flash")
    assert not flash_calls


def test_flash_rejects_cpu_tensors(flash_calls, monkeypatch):
    with pytest.raises(ValueError, match="attend: backend='flash' takes CUDA tensors, got cpu"):
        attend(*half(*LONG), backend="flash")
    monkeypatch.setenv(VARIABLE, "flash")
    with pytest.raises(ValueError, match=f"attend: {VARIABLE}=flash takes CUDA tensors, got cpu"):
        attend(*half(*LONG))


def test_flash_rejects_old_gpus(fake_gpu, flash_calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"capability 8\.0, got 7\.5"):
        attend(*on_fake_gpu(half(*LONG)), backend="flash")


def test_flash_needs_its_package(fake_gpu):
    with pytest.raises(ValueError, match="needs the package flash-attn, which is not installed"):
        attend(*on_fake_gpu(half(*LONG)), backend="flash")


def test_a_broken_flash_attn_is_not_passed_over(fake_gpu, flash_calls, monkeypatch):
    install(monkeypatch)  # without the function, as releases before 2
    with pytest.raises(ImportError, match=f"cannot import name 'flash_attn_func'.*{VARIABLE}=sdpa"):
        attend(*on_fake_gpu(half(*LONG)))


@pytest.mark.parametrize("by_variable", [True, False])
def test_unknown_name_is_rejected(by_variable, monkeypatch):
    asked = f"{VARIABLE}=xformers" if by_variable else "backend='xformers'"
    if by_variable:
        monkeypatch.setenv(VARIABLE, "xformers")
    message = f"attend: {asked} is unknown, expected one of auto, flash, sdpa, math"
    with pytest.raises(ValueError, match=message):
        attend(*half(*LONG), backend="auto" if by_variable else "xformers")


# -- graphs and imports ----------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [16, 80])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("flash", [True, False])
def test_temporal_attention_can_be_captured(flash, biased, frames, fake_gpu, monkeypatch, request):
    flash_calls = request.getfixturevalue("flash_calls") if flash else []
    sdpa, sdpa_calls = F.scaled_dot_product_attention, []

    def seen(*tensors, attn_mask):
        sdpa_calls.append(tensors)
        assert attn_mask is (buffers["bias"] if biased else None)
        return sdpa(*tensors, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    with FakeTensorMode():
        buffers = {
            "rows": torch.empty(2, 6, frames, 2 * 32, dtype=torch.bfloat16, device="cuda"),
            "bias": torch.empty(2, frames, frames, dtype=torch.bfloat16, device="cuda"),
        }

    def step():
        q = buffers["rows"].unflatten(-1, (2, 32)).transpose(-3, -2)
        out = attend(q, q, q, buffers["bias"] if biased else None)
        assert out.shape == q.shape
        buffers["rows"].copy_(out.transpose(-3, -2).flatten(-2))

    report = audit(step, buffers)
    assert report.clean, report
    by_flash = flash and not biased
    # B * H*W, the four dimensions that fused CUDA kernels take
    assert shapes(flash_calls) == [[(12, frames, 2, 32)] * 3] * 2 * by_flash
    assert shapes(sdpa_calls) == [[(12, 2, frames, 32)] * 3] * 2 * (not by_flash)


def shapes(calls: list[tuple[Tensor, ...]]) -> list[list[tuple[int, ...]]]:
    return [[tuple(x.shape) for x in call] for call in calls]


@pytest.mark.parametrize("keys", [16, 80])
def test_attend_compiles_whole(keys):
    arguments = inputs((1, 2, 16, 8), keys, torch.float32, biased=True)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), attend(*arguments))


def test_importing_vfengine_leaves_flash_attn_alone(tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise RuntimeError('imported')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, vfengine.ops.attention as a\n"
        "assert a._flash_installed()\n"
        "a.attend(*[torch.ones(1, 1, 80, 8, dtype=torch.float16)] * 3)\n"
        "assert 'flash_attn' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
