"""The default model, trained by the clock with its own commands; weights in files of 16 MiB.

Text encoder and autoencoder first, then latents, then both networks: processes side by side, whose
launches keep a GPU busy only together. Learning rates fall with the steps, so a short trial counts
how many steps there will be time for.

A model to go on from gives its parts and the weights to begin with. It is the shipped one, if that
is on latents, or the folder that VFENGINE_TRAIN_FROM names; "nothing" trains all from the start.
Its decoder then trains beside the networks, against an adversary: with the encoder kept, they do
not depend on it. VFENGINE_TRAIN_SECONDS is the time of the whole section.

In the folder of gpu.jsonl, train/ then holds checkpoints, logs and sheets of samples in an archive
cut in pieces: `cat model.tar.* | tar x` unpacks it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from gpu_run.sections import DEVICE, DRY, emit

SECONDS = 240 if DRY else float(os.environ.get("VFENGINE_TRAIN_SECONDS", "400"))
PARTS_SHARE = 0.35  # of the seconds, where the parts are trained too
SAVING = 2 if DRY else 25  # seconds kept for the last samples, merging and writing
PIECE = 16 * 2**20  # bytes
TRIAL_STEPS = 3 if DRY else 60

NETWORKS = ("base", "residual")
CLIPS = {
    "base": ("--num-clips", "60", "--base-images", "20000", "--captions", "2"),
    "residual": ("--num-clips", "8000", "--captions", "2"),
}
BATCHES = {"base": ("--batch-size", "160"), "residual": ("--batch-size", "48")}
RATES = ("--learning-rate", "8e-4", "--warmup", "100", "--decay", "0.6")
LATENTS = ("--cell-weight", "3")
DECODER = (
    *("--objective", "autoencoder", "--keep-encoder", "--adversary", "0.3"),
    *(*RATES, "--learning-rate", "3e-4"),
    *("--num-clips", "3000", "--seed", "1", "--batch-size", "32"),
)
FEW_CLIPS = ("--num-clips", "60", "--captions", "2")  # for what only puts networks together
if DRY:
    CLIPS = {"base": ("--num-clips", "4", "--base-images", "4"), "residual": ("--num-clips", "4")}
    BATCHES = dict.fromkeys(NETWORKS, ("--batch-size", "2", "--extra-images", "0"))
    FEW_CLIPS = CLIPS["residual"]
SMALL = (
    *("--size", "16", "--num-frames", "4", "--captions", "2", "--layers-per-block", "1,1"),
    *("--base-channels", "32,32", "--residual-channels", "32,32"),
)


class Unavailable(Exception):
    """Something is missing here."""


class Work:
    """Runs vfengine.train in a folder, against the clock."""

    def __init__(self, folder: Path):
        self.folder, self.end = folder, time.monotonic() + SECONDS
        self.merged: list[str] = []  # jobs whose weights are in the merged checkpoint

    @property
    def left(self) -> float:
        """Seconds, without those that saving takes."""
        return max(self.end - time.monotonic() - SAVING, 0)

    def run(self, jobs: dict[str, tuple[str, ...]], *flags: str) -> dict[str, Path]:
        """Trainings side by side; returns the checkpoints of those that end well, by their names.

        Raises Unavailable for a missing package, RuntimeError where none ends well.
        """
        start = time.monotonic()
        running, failed = {}, {}
        for name, own in jobs.items():
            command = [sys.executable, "-m", "vfengine.train", "--device", DEVICE, *own, *flags]
            command += ["--output", str(self.folder / name)]
            running[name] = subprocess.Popen(
                command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
            )
        for name, process in running.items():
            said = process.communicate()[1]
            print(said, file=sys.stderr)
            if process.returncode:
                last = (said.strip().splitlines() or ["nothing"])[-1]
                missing = "No module named" in last or "pip install" in last
                if missing:
                    raise Unavailable(f"{name}: {last}")
                failed[name] = last
                emit("default model", name, status="failed", note=last[:300])
                continue
            emit("default model", name, "time", time.monotonic() - start, "s")
        if len(failed) == len(jobs):
            raise RuntimeError("; ".join(f"{name}: {last}" for name, last in failed.items()))
        return {name: self.folder / name / "checkpoint" for name in jobs if name not in failed}

    def train(self, jobs: dict[str, tuple[str, ...]], seconds: float) -> dict[str, Path]:
        """`run` for so many seconds, in as many steps as there is time for."""
        end = time.monotonic() + seconds
        trial = ("--steps", str(TRIAL_STEPS), "--log-every", str(max(1, TRIAL_STEPS // 3)))
        trials = {f"trial {name}": (*own, *trial) for name, own in jobs.items()}
        fit = self.run(trials, *QUIET)
        jobs = {name: own for name, own in jobs.items() if f"trial {name}" in fit}
        seconds = end - time.monotonic()
        limit = ("--max-minutes", str(max(seconds, 0) / 60))
        counted = {}
        for name, own in jobs.items():
            start, *lines = self.lines(f"trial {name}")
            steps = 0.85 * lines[-1]["clips_per_second"] / start["batch_size"] * seconds
            steps = TRIAL_STEPS if DRY else max(1, int(steps))
            counted[name] = (*own, *limit, "--steps", str(steps))
        checkpoints = self.run(counted, *RARELY)
        for name in checkpoints:
            for key, value in self.lines(name)[-1].items():
                if isinstance(value, (int, float)):
                    unit = "1/s" if key == "clips_per_second" else ""
                    emit("default model", name, key, value, unit)
        return checkpoints

    def lines(self, name: str) -> list[dict]:
        """Of a training's log: how it started, and what its steps told."""
        text = (self.folder / name / "log.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


QUIET = ("--save-every", "1000000", "--sample-every", "0")
RARELY = ("--save-every", "2000", "--sample-every", "1000000")  # samples of the last step alone


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder))
        try:
            train(work)
        except Unavailable as missing:
            emit("default model", status="unavailable", note=str(missing))
        finally:
            _keep(work)


def train(work: Work) -> None:
    source = None if DRY else _source()
    model, start = (SMALL if DRY else ()), ()
    if source is not None:
        from vfengine.formats.checkpoint import read_config

        config = read_config(source)
        autoencoder = text = source
        start = ("--init-from", str(source))
        for name in NETWORKS:
            channels = ",".join(map(str, config.unet_config(name).block_out_channels))
            model = (*model, f"--{name}-channels", channels)
    elif DRY:
        autoencoder, text = _tiny_parts(work.folder)
    else:
        objectives = {name: ("--objective", name) for name in ("autoencoder", "text")}
        parts = work.train(objectives, PARTS_SHARE * work.left)
        autoencoder, text = parts["autoencoder"], parts["text"]
    cache = ("--clips-cache", str(work.folder / "clips"))
    common = ("--autoencoder", str(autoencoder), "--text-encoder", str(text), *model, *cache)
    rates = (*RATES, *LATENTS)
    jobs = {
        name: (*common, *start, *rates, *CLIPS[name], *BATCHES[name], "--train", name)
        for name in NETWORKS
    }
    if source is not None:
        jobs["decoder"] = (*DECODER, *start, *cache)
    trained = work.train(jobs, work.left)
    made = dict.fromkeys(NETWORKS, source) | trained
    if None in made.values():  # of a model from the start, which has failed in part
        return
    merge = ("--init-from", str(made["base"]), "--residual-from", str(made["residual"]))
    if "decoder" in made:  # the last of two flags counts
        merge = (*merge, "--autoencoder", str(made["decoder"]))
    work.run({"merged": (*common, *FEW_CLIPS, *merge)}, *QUIET, "--max-minutes", "0")
    work.merged = list(trained)


def _source() -> Path | None:
    """The model to go on from."""
    from vfengine.formats.checkpoint import DEFAULT, read_config

    named = os.environ.get("VFENGINE_TRAIN_FROM")
    if named == "nothing":
        return None
    source = Path(named) if named else DEFAULT
    return source if named or read_config(source).autoencoder is not None else None


def _tiny_parts(folder: Path) -> list[Path]:
    """With random weights: to train them would take longer than a dry run may."""
    from vfengine.formats.parts import save_autoencoder, save_text_encoder
    from vfengine.formats.word_tokenizer import word_tokenizer_json
    from vfengine.models import (
        Autoencoder,
        AutoencoderConfig,
        Decoder,
        Encoder,
        TextEncoder,
        TextEncoderConfig,
    )

    text = TextEncoderConfig(4, 8, 16, 1, 2, 16, causal=False)
    words = word_tokenizer_json(["person", "kicking"])
    save_text_encoder(folder / "text", text, TextEncoder(text).state_dict(), words)
    config = AutoencoderConfig(
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_groups=8, mid_attention=False
    )
    state = Autoencoder(config, Decoder(config), Encoder(config)).state_dict()
    save_autoencoder(folder / "autoencoder", config, state, (0.0,) * 4, (1.0,) * 4)
    return [folder / "autoencoder", folder / "text"]


def _keep(work: Work) -> None:
    """Logs, samples and checkpoints, to the folder of gpu.jsonl: also of what failed later on."""
    out = Path(os.environ["VFENGINE_GPU_OUT"]) / "train"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    whole = work.folder / "model.tar"
    runs = [path for path in sorted(work.folder.iterdir()) if (path / "log.jsonl").is_file()]
    weights = [r for r in runs if not r.name.startswith("trial") and r.name not in work.merged]
    with tarfile.open(whole, "w") as archive:
        for run in runs:
            kept = ("log.jsonl", "samples", *(("checkpoint",) if run in weights else ()))
            for path in (run / name for name in kept):
                if path.exists():
                    archive.add(path, f"{run.name}/{path.name}")
    with whole.open("rb") as file:
        for number, piece in enumerate(iter(lambda: file.read(PIECE), b"")):
            (out / f"model.tar.{number:02}").write_bytes(piece)


if __name__ == "__main__":
    main()
