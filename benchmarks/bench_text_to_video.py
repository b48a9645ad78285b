"""A published text-to-video model on a CPU in bf16, part by part and as a whole, beside diffusers.

Weights are random, at the width of ModelScope's model (lib/published_model.py), in one folder that
both read. First our output of each part is compared with that of diffusers in fp32: its relative
error may be 1.5 times that of diffusers in bf16, else nothing is timed. Then the two take turns.

text    the prompt and the negative one, 77 tokens each, as one batch
unet    one step's call: the guided pair of a clip of 16 frames, 256 x 256, as one batch of two
decode  the latents of that clip; diffusers decodes all frames at once, as its pipeline does
clip    reading the folder, text, two steps and decoding, each contender in a process of its own
        (lib/peak_memory.py): peak memory above the idle process, and that of the whole process

The script needs 7 GB in the temporary folder, 13 GB of memory and ten minutes on two cores. Under
pytest the model and the clip are small.

    python benchmarks/bench_text_to_video.py [--rounds R] [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lib import peak_memory
from lib.harness import Row, Target, main, say, table
from lib.published_model import EAGER, OURS, WIDTHS, draw, save
from lib.unet_contenders import relative_error, require_accuracy
from torch import Tensor

from vfengine.formats.load import find_tokenizer
from vfengine.models import load_autoencoder, load_text_encoder, load_unet

PROMPT = "a panda eats bamboo on a rock"
FASTER, MEMORY, RATIO = "time / vfengine", "peak memory", "peak memory / diffusers"
TARGETS = [
    Target("text", EAGER, FASTER, 1.0),
    Target("unet", EAGER, FASTER, 1.5),
    Target("decode", EAGER, FASTER, 1.8),
    Target("clip", OURS, RATIO, 0.8, at_most=True),
    Target("clip", OURS, "process", 12 * 1024, at_most=True),
]
TWO_CALLS = "vfengine, a call for each"  # of the guided pair; pipelines take the faster way
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Clip:
    """What is made, and of which widths the model is."""

    widths: str = "published"
    frames: int = 16
    pixels: int = 256

    @property
    def latents(self) -> tuple[int, ...]:
        return (1, self.frames, 4, self.pixels // 8, self.pixels // 8)


PUBLISHED, SMALL = Clip(), Clip("small", 4, 64)


@torch.no_grad()
def measure(clip: Clip = PUBLISHED, rounds: int = 3, folder: str | None = None) -> list[Row]:
    """folder: an already written model of this width; None: one is drawn."""
    if folder is not None:
        return _measured(clip, rounds, Path(folder))
    with tempfile.TemporaryDirectory() as written:
        say(f"drawing and saving a model of {clip.widths} width")
        save(Path(written), draw(clip.widths))
        gc.collect()
        return _measured(clip, rounds, Path(written))


def _measured(clip: Clip, rounds: int, folder: Path) -> list[Row]:
    rows = []
    for part, load in PARTS.items():
        say(f"{part}: {EAGER} in fp32")
        exact = load(EAGER, clip, folder, torch.float32)()
        gc.collect()
        calls, errors = {}, {}
        for name in CONTENDERS.get(part, (OURS, EAGER)):
            say(f"{part}: loading {name}, first call")
            calls[name] = load(name, clip, folder, torch.bfloat16)
            errors[name] = relative_error(calls[name](), exact)
        require_accuracy(part, errors, EAGER, 1.5)
        rows += _rows(part, errors, _turns(part, calls, rounds))
        calls.clear()
        gc.collect()
    return [*rows, *_memory_rows(clip, folder)]


# -- parts: a call of one contender, frames in the second dimension --------------------------------


def _text(contender: str, clip: Clip, folder: Path, dtype: torch.dtype) -> Call:
    from transformers import CLIPTextModel

    if contender == OURS:
        ours = load_text_encoder(folder, dtype)
        ids = ours.tokenize([PROMPT, ""])
        return lambda: ours(ids)
    theirs = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
    ids = find_tokenizer(folder)([PROMPT, ""])
    return lambda: theirs(ids).last_hidden_state


def _unet(contender: str, clip: Clip, folder: Path, dtype: torch.dtype) -> Call:
    from diffusers import UNet3DConditionModel

    random = torch.Generator().manual_seed(5)
    z = torch.randn(clip.latents, generator=random).repeat(2, 1, 1, 1, 1)
    width, t = WIDTHS[clip.widths].unet["cross_attention_dim"], torch.tensor([500, 500])
    context = torch.randn(2, 77, width, generator=random)
    if contender in (OURS, TWO_CALLS):
        ours = load_unet(folder, dtype)
        if contender == OURS:
            return lambda: ours(z, t, context)
        pair = [(z[k : k + 1], t[k : k + 1], context[k : k + 1]) for k in (0, 1)]
        return lambda: torch.cat([ours(*one) for one in pair])
    theirs = UNet3DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).eval()
    z, context = z.transpose(1, 2).to(dtype), context.to(dtype)
    return lambda: theirs(z, t, context).sample.transpose(1, 2)


def _decode(contender: str, clip: Clip, folder: Path, dtype: torch.dtype) -> Call:
    from diffusers import AutoencoderKL

    z = torch.randn(clip.latents, generator=torch.Generator().manual_seed(6))
    if contender == OURS:
        ours = load_autoencoder(folder, dtype)
        return lambda: ours.decode(z)
    theirs = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).eval()
    z = z[0].to(dtype)
    return lambda: theirs.decode(z).sample[None]


PARTS = {"text": _text, "unet": _unet, "decode": _decode}
CONTENDERS = {"unet": (OURS, TWO_CALLS, EAGER)}


# -- turns and rows --------------------------------------------------------------------------------


def _turns(part: str, calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, by rounds; their first calls are behind them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        say(f"{part}: round {index + 1} of {rounds}")
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def _rows(
    part: str, errors: Mapping[str, float], times: Mapping[str, Sequence[float]]
) -> list[Row]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, seconds in medians.items():
        rows += [
            Row(part, name, "time", seconds, "s"),
            Row(part, name, FASTER, seconds / medians[OURS], "x"),
            Row(part, name, "slowest / fastest", max(times[name]) / min(times[name]), ""),
            Row(part, name, "error", errors[name] * 1e3, "1e-3"),
        ]
    return rows


def _memory_rows(clip: Clip, folder: Path) -> list[Row]:
    peaks = {}
    for name in (OURS, EAGER):
        say(f"clip: memory of {name}")
        settings = {"num_inference_steps": 2, "num_frames": clip.frames}
        settings |= {"height": clip.pixels, "width": clip.pixels}
        arguments = {"contender": name, "folder": str(folder), "prompt": PROMPT, **settings}
        peaks[name] = peak_memory.measure("lib.published_model:clip", arguments)
    rows = []
    for name, peak in peaks.items():
        rows += [
            Row("clip", name, MEMORY, peak.main, "MiB"),
            Row("clip", name, RATIO, peak.main / peaks[EAGER].main, "x"),
            Row("clip", name, "process", peak.idle + peak.main, "MiB"),
        ]
    return rows


# -- the two forms ---------------------------------------------------------------------------------


def bench_text_to_video(benchmark, capsys, short):
    options = {"clip": SMALL, "rounds": 1 if short else 5}
    rows = benchmark.pedantic(measure, kwargs=options, rounds=1)
    benchmark.extra_info["rows"] = [vars(row) for row in rows]
    with capsys.disabled():
        print(f"\n{table(rows)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="turns of each part")
    parser.add_argument("--folder", metavar="FOLDER", help="a model of this width, in place of one")
    options, _ = parser.parse_known_args()
    main(lambda: measure(PUBLISHED, options.rounds, options.folder), __doc__, TARGETS, parser)
