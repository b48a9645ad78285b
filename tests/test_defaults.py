"""torch.set_default_dtype and set_default_device of the caller's program change nothing here."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from latent_models import save_latent_model
from test_training import new_trainer

import vfengine

ROOT = Path(vfengine.__file__).parent
FACTORIES = (
    *("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "zeros", "tensor"),
    *("rand", "randint", "randn", "randperm", "as_tensor"),
)
MAKERS = {"as_tensor"}  # of what may be a tensor, whose dtype stays
DEFAULTS = ("float64", "float16", "bfloat16", "meta")


@contextmanager
def defaults(name: str) -> Iterator[None]:
    """The `with` block runs under this default device or dtype."""
    try:
        if name == "meta":
            torch.set_default_device(name)
        else:
            torch.set_default_dtype(getattr(torch, name))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def factory_calls(file: Path) -> Iterator[ast.Call]:
    """The calls torch.zeros(…) and so on of a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES:
                yield node


@pytest.mark.parametrize("folder", sorted(p.name for p in ROOT.iterdir() if p.suffix != ".so"))
def test_new_tensors_name_dtype_and_device(folder):
    """A `**like` may name both."""
    place = ROOT / folder
    files = [place] if place.suffix == ".py" else place.rglob("*.py")
    for file in files:
        for call in factory_calls(file):
            named = {keyword.arg for keyword in call.keywords}
            needed = {"device"} if call.func.attr in MAKERS else {"dtype", "device"}
            where = f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
            assert None in named or needed <= named, where


def clip(folder: Path | None, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The frames of a clip, and its base path."""
    pipe = vfengine.load_pipeline(folder, device="cpu", dtype=torch.float32)
    made = pipe(num_inference_steps=2, lam=0.3, **settings)
    return torch.from_numpy(made.frames), made.trajectory.states


@pytest.fixture(scope="module", params=["pixels", "latents"])
def model(request, tiny_checkpoint, tmp_path_factory):
    """A checkpoint, and what it makes under the usual defaults: windows, noise in steps, a text."""
    folder, settings = tiny_checkpoint, {"num_frames": 8, "window": 4, "eta": 0.5}
    if request.param == "latents":
        folder = save_latent_model(tmp_path_factory.mktemp("models") / "latent")
    return folder, settings, clip(folder, **settings)


@pytest.mark.parametrize("name", DEFAULTS)
def test_clips_are_the_same(model, name):
    folder, settings, expected = model
    with defaults(name):
        made = clip(folder, **settings)
    for one, two in zip(made, expected, strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


@pytest.mark.slow
def test_the_shipped_model_makes_the_same_clip():
    """Its networks, text encoder and decoder, whose kernels are not all the tiny model's."""
    expected = clip(None, num_frames=4)
    for name in ("bfloat16", "meta"):
        with defaults(name):
            made = clip(None, num_frames=4)
        assert all(map(torch.equal, made, expected))


def trained() -> tuple[dict[str, float], list[torch.Tensor]]:
    """The losses of a training's second step, and all weights after it."""
    trainer = new_trainer()
    trainer.step()
    losses = dict(trainer.step().losses)
    return losses, [w for network in trainer.networks.values() for w in network.parameters()]


def test_a_training_takes_the_same_steps():
    losses, weights = trained()
    for name in ("bfloat16", "meta"):
        with defaults(name):
            made_losses, made_weights = trained()
        assert made_losses == losses
        for one, two in zip(made_weights, weights, strict=True):
            assert one.dtype == torch.float32 and torch.equal(one, two)
