"""What the same seeds give: which settings leave a clip equal to the bit, and how far others are.

python tests/tools/same_seeds.py [--out docs/same-seeds.md] [--steps 2] [--long 50] [--only PART …]

Clips of the shipped model, of a tiny model of labels, and of a tiny text-to-video pipeline of
published form are made again and again, with one thing changed. Exits with 1 where what is promised
(docs/reliability.md, "Determinism") does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "sampling"), str(TESTS.parent)]

from conftest import save_tiny  # noqa: E402
from kill_server import create  # noqa: E402
from published_folders import small_diffusers_folder  # noqa: E402
from server_process import ServerProcess, until  # noqa: E402
from stub_cuda import OnTheCpu, pretended, stub_with_loops  # noqa: E402

import vfengine as vf  # noqa: E402
from vfengine.cli.bench import _cpu_name  # noqa: E402
from vfengine.media.pictures import to_uint8  # noqa: E402
from vfengine.media.video import read_video  # noqa: E402
from vfengine.native import vfengine_native  # noqa: E402
from vfengine.serving.store import Store  # noqa: E402

LABEL = "cartwheel"
FRAMES = 4  # of most clips
FLOAT, HALF = torch.float32, torch.bfloat16


class Table:
    """Rows of a page of Markdown: what was changed, and what that did to the clip."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.broken: list[str] = []

    def part(self, title: str) -> None:
        head = "| changed | beside | promised | equal | greatest difference | pixels that differ |"
        self.lines += ["", f"## {title}", "", f"{head} PSNR |", "|---|---|---|---|---|---|---|"]

    def row(self, what: str, beside: str, a: np.ndarray, b: np.ndarray, promised: bool) -> None:
        """Clips of floats in 0..1, or of bytes; in Markdown and on stderr."""
        if a.dtype == np.uint8:
            a, b = (x.astype(np.float32) / 255 for x in (a, b))
        equal, apart = np.array_equal(a, b), np.abs(a.astype(np.float64) - b)
        pixels = (to_uint8(a) != to_uint8(b)).any(-1).mean()
        error = float(np.square(apart).mean())
        psnr = "" if error == 0 else f"{-10 * np.log10(error):.1f} dB"
        far = ["", "", ""] if equal else [f"{apart.max():.1e}", f"{pixels:.2%}", psnr]
        cells = [what, beside, "yes" if promised else "no", "yes" if equal else "no", *far]
        if promised and not equal:
            self.broken.append(f"{what} beside {beside}")
        self._add(cells)

    def not_measured(self, what: str) -> None:
        self._add([what, "CPU", "no", "not measured", "", "", ""])

    def _add(self, cells: list[str]) -> None:
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], file=sys.stderr, flush=True)


@contextmanager
def isa(name: str) -> Iterator[None]:
    former = vfengine_native.cpu_isa()
    vfengine_native.set_cpu_isa(name)
    try:
        yield
    finally:
        vfengine_native.set_cpu_isa(former)


@contextmanager
def threads(count: int) -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def isas() -> list[str]:
    """Those that this CPU can run, the plainest first."""
    return list(vfengine_native.cpu_isas)


def has_bf16(name: str) -> bool:
    with isa(name):
        return vfengine_native.cpu_has_bf16()


class Model:
    """A model's clips, by what is changed. frames: None is as many as it was trained on."""

    def __init__(
        self,
        folder: Path | None,
        steps: int,
        dtype: torch.dtype = FLOAT,
        frames: int | None = FRAMES,
    ) -> None:
        self.folder, self.steps, self.dtype, self.frames = folder, steps, dtype, frames
        self.pipe = vf.load_pipeline(folder, device="cpu", dtype=dtype)

    def __call__(self, shown: str | None = LABEL, **changes) -> np.ndarray:
        return self.output(shown, **changes).frames

    def output(self, shown: str | None = LABEL, **changes):
        settings = {"num_inference_steps": self.steps, "num_frames": self.frames, **changes}
        return self.pipe(shown, **settings)


# -- parts of the page -----------------------------------------------------------------------------


def sizes(table: Table, model: Model, name: str, shown: str = LABEL) -> None:
    """Threads and batches."""
    with threads(1):
        one = model(shown)
    for count in (2, 3):
        with threads(count):
            table.row(f"{count} threads", f"1 thread, {name}", model(shown), one, False)
    for count in (2, 3, 4):
        batch = model(shown, num_videos=count)
        last = model(shown, sample_offset=count - 1)
        table.row(f"first of a batch of {count}", f"alone, {name}", batch[:1], one, True)
        table.row(f"last of a batch of {count}", f"alone, {name}", batch[-1:], last, True)


def ways(table: Table, model: Model, folder: Path) -> None:
    """What changes how a clip is made, and not which."""
    out = model.output()
    clip = out.frames
    rows: list[tuple[str, Callable[[], np.ndarray]]] = [
        ("made again", model),
        ("a new pipeline", lambda: Model(model.folder, model.steps, model.dtype)()),
        ("base network kept", lambda: model(offload_base=False)),
        ("base network freed", lambda: model(offload_base=True)),
        ("phases overlapped", lambda: model(base_path="stepwise", overlap_phases=True)),
        ("base cache, filled", lambda: model(base_cache=folder / "cache")),
        ("base cache, read", lambda: model(base_cache=folder / "cache")),
        ("its base path given", lambda: model(trajectory=out.trajectory)),
        ("first of 3 residuals", lambda: model(num_residuals=3)[:1]),
        ("window of all frames", lambda: model(window=clip.shape[1])),
    ]
    for what, make in rows:
        beside = model(base_path="stepwise") if what == "phases overlapped" else clip
        table.row(what, "a clip", make(), beside, True)
    frame = model.pipe.preview(LABEL, num_inference_steps=model.steps).frames
    middle = (clip.shape[1] - 1) // 2
    kept = [k for k in range(clip.shape[1]) if np.array_equal(clip[:, k], frame[:, 0])]
    table.row("preview", "its frame", frame, clip[:, kept[:1] or [middle]], True)


def kinds(table: Table, model: Model) -> None:
    """Base path kinds, solvers with noise of their own, and how far they are from each other."""
    for kind in ("stepwise", "clean"):
        table.row(f"base path {kind}", "made again", *(model(base_path=kind) for _ in "ab"), True)
    for solver, eta in (("ddim", 1.0), ("dpmsolver++", 0.0), ("unipc", 0.0)):
        a, b = (model(solver=solver, eta=eta) for _ in "ab")
        table.row(f"solver {solver}, eta {eta:g}", "made again", a, b, True)
    pair = (model(base_path=kind) for kind in ("clean", "stepwise"))
    table.row("base path clean", "base path stepwise", *pair, False)


def plain(table: Table, model: Model) -> None:
    """PyTorch's own networks beside planned ones."""

    def in_torch(network, dtype, device):
        return network.to(dtype).eval().requires_grad_(False)

    with mock.patch("vfengine.pipelines.session.for_inference", in_torch):
        clip = Model(model.folder, model.steps, model.dtype)()
    table.row("networks in PyTorch", "planned", clip, model(), False)


def instruction_sets(table: Table, folder: Path | None, steps: int) -> None:
    """Every instruction set in both dtypes, beside the one in use."""
    best = {dtype: Model(folder, steps, dtype)() for dtype in (FLOAT, HALF)}
    used = vfengine_native.cpu_isa()
    for name in isas():
        for dtype in (FLOAT, HALF):
            if dtype is HALF and not has_bf16(name):
                continue
            with isa(name):
                model = Model(folder, steps, dtype)
                a, b = model(), model(num_videos=2)[:1]
            short = str(dtype).removeprefix("torch.")
            table.row(f"{name}, {short}, batch of 2", f"{name}, alone", b, a, True)
            if name != used:
                table.row(f"{name}, {short}", f"{used}, {short}", a, best[dtype], False)
    table.row("bfloat16", "float32", best[HALF], best[FLOAT], False)


def captured(table: Table, folder: Path) -> None:
    patch = pytest.MonkeyPatch()
    try:
        pipe, clip = pretended(stub_with_loops(patch), folder, "walk", num_inference_steps=4)
        with OnTheCpu():
            frames = pipe("walk", num_inference_steps=4, offload_base=False).frames
    finally:
        patch.undo()
    table.row("captured steps (a stub of CUDA graphs)", "plain steps", frames, clip, True)


def doors(table: Table, folder: Path, model_folder: Path, steps: int) -> None:
    """The command in processes of its own, and a server, beside Python."""
    made = to_uint8(Model(model_folder, steps)(base_seed=3, residual_seed=5))[0]
    flags = ["--model", model_folder, "--device", "cpu", "--dtype", "float32", "--label", LABEL]
    flags += [
        "--num-frames",
        FRAMES,
        "--num-inference-steps",
        steps,
        "--base-seed",
        3,
        "--residual-seed",
        5,
    ]
    files = [folder / f"{k}.webp" for k in range(2)]
    for file in files:
        command = [sys.executable, "-m", "vfengine", "generate", *flags, "--output", file]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    clips = [read_video(file).frames for file in files]
    table.row("vfengine generate", "Python", clips[0], made, True)
    table.row("the process started again", "the first one", clips[1], clips[0], True)
    same = np.array(files[0].read_bytes() == files[1].read_bytes(), np.float32).reshape(1, 1, 1)
    table.row("bytes of its file", "of the first one", same, np.ones_like(same), True)
    server = ServerProcess(
        folder / "store",
        folder / "server.log",
        *("--model", model_folder, "--device", "cpu", "--dtype", "float32"),
    )
    server.start()
    try:
        seeds = {"seed": 3, "base_seed": 3, "residual_seed": 5}
        fields = {"prompt": LABEL, "format": "webp", "num_inference_steps": steps, **seeds}
        name = create(server, fields, None).json["id"]
        store = Store(folder / "store")
        until(lambda: store.get(name).status in ("completed", "failed"), "a clip", 0.1)
        frames = read_video(store.file(name, "video.webp")).frames
        store.close()
    finally:
        server.stop()
    table.row("vfengine serve", "Python", frames, made, True)


def published(table: Table, folder: Path, steps: int, long: int) -> None:
    table.part("A tiny text-to-video pipeline, 3 steps")
    sizes(table, Model(small_diffusers_folder(folder / "published"), 3), "float32", "a cat")


def tiny(table: Table, folder: Path, steps: int, long: int) -> None:
    model = save_tiny(folder / "tiny")
    table.part("Ways to ask, a tiny model, 4 steps")
    doors(table, folder, model, 4)
    captured(table, model)
    table.part("Instruction sets, a tiny model, 4 steps")
    instruction_sets(table, model, 4)


def shipped(table: Table, folder: Path, steps: int, long: int) -> None:
    for dtype in (HALF, FLOAT):
        short = str(dtype).removeprefix("torch.")
        table.part(f"The shipped model, {FRAMES} frames, {steps} steps, {short}")
        model = Model(None, steps, dtype)
        sizes(table, model, short)
        ways(table, model, folder / short)
        kinds(table, model)
        plain(table, model)


def key_rows(table: Table, folder: Path, steps: int, long: int) -> None:
    table.part(f"The shipped model, {FRAMES} frames, {long} steps")
    clips = {}
    for dtype in (HALF, FLOAT):
        short = str(dtype).removeprefix("torch.")
        model = Model(None, long, dtype)
        one = clips[dtype] = model()
        with threads(2):
            table.row(f"{short}, 2 threads", "1 thread", model(), one, False)
        batch = model(num_videos=2)
        table.row(f"{short}, first of a batch of 2", "alone", batch[:1], one, True)
    table.row("bfloat16", "float32", clips[HALF], clips[FLOAT], False)


def devices(table: Table, folder: Path, steps: int, long: int) -> None:
    table.part("Devices")
    if not torch.cuda.is_available():
        table.not_measured("CUDA, float32")
        return
    gpu = vf.load_pipeline(None, device="cuda", dtype=FLOAT)
    short = {"num_inference_steps": steps, "num_frames": FRAMES}
    frames = gpu(LABEL, **short).frames
    table.row("CUDA, float32", "CPU, float32", frames, Model(None, steps)(), False)
    table.row("CUDA, again", "CUDA", gpu(LABEL, **short).frames, frames, False)


PARTS = {part.__name__: part for part in (tiny, published, shipped, key_rows, devices)}

HEAD = """# The same seeds

Written by `python tests/tools/same_seeds.py` on {date}: {cpu}, {cores} cores, instruction set
`{isa}`, torch {torch}. A clip is made twice with one thing changed. "Promised" is what
[reliability.md](reliability.md#determinism) promises on a CPU. Differences are those of pixels in
0..1. A pixel differs if one of its three bytes does. Each PSNR is that of two clips, not of a clip
and the truth.

Networks do not depend on the number of threads. A softmax of PyTorch's behind the shipped model's
residual network does, where the threads cannot share its values evenly. `amx_emulated` is built for
CPUs without AVX, and sums as `baseline` does."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Write which clips are equal to the bit.")
    parser.add_argument("--out", type=Path, default=TESTS.parent / "docs" / "same-seeds.md")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--steps", type=int, default=2, help="of most clips")
    parser.add_argument("--long", type=int, default=50, help="of the key rows'")
    flags = parser.parse_args()
    os.environ["PYTHONPATH"] = str(TESTS.parent)  # of the processes that are started
    torch.set_num_threads(1)
    head = HEAD.format(
        date=datetime.date.today(),
        cpu=_cpu_name(),
        cores=os.cpu_count(),
        isa=vfengine_native.cpu_isa(),
        torch=torch.__version__,
    )
    with tempfile.TemporaryDirectory() as temporary:
        table = Table()
        for name in flags.only or PARTS:
            PARTS[name](table, Path(temporary), flags.steps, flags.long)
            text = "\n".join([head, *table.lines]) + "\n"
            flags.out.write_text(text, encoding="utf-8")
    print("\n".join(f"promised, and not so: {row}" for row in table.broken) or "as promised")
    return 1 if table.broken else 0


if __name__ == "__main__":
    sys.exit(main())
