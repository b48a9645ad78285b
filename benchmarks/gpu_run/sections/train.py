"""The default model, trained by the clock with its own commands; weights in files of 16 MiB.

Text encoder and autoencoder first, then latents, then both networks at once, a process each, for
their launches keep a GPU busy only together. A learning rate falls with the steps, so a short trial
counts how many there will be. Parts that the environment names are taken, not trained:

    VFENGINE_AUTOENCODER, VFENGINE_TEXT_ENCODER    checkpoints of earlier trainings
    VFENGINE_INIT_FROM                             a model to go on from

In the folder of gpu.jsonl, train/ then holds a checkpoint cut in pieces (`cat model.tar.*` is it),
the logs and the sheets of samples.
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

SECONDS = 240 if DRY else 400  # of the whole section
PIECE = 16 * 2**20  # bytes
SHARES = {"text": 0.1, "autoencoder": 0.3}  # of the seconds
SAVING = 2 if DRY else 25  # seconds kept for the last samples, merging and writing

CLIPS = ["--num-clips", "8", "--num-frames", "4"] if DRY else ["--num-clips", "24000"]
SMALL = ["--base-channels", "32,32", "--residual-channels", "32,32", "--layers-per-block", "1,1"]
MODEL = [*CLIPS, *(["--size", "16", *SMALL] if DRY else [])]
BATCH = {
    "base": ["--batch-size", "2", "--extra-images", "2"] if DRY else ["--batch-size", "256"],
    "residual": ["--batch-size", "2"] if DRY else ["--batch-size", "48"],
}
RATES = ["--learning-rate", "1e-3", "--ema", "0.998", "--decay", "0.6"]
TRIAL_STEPS = 3 if DRY else 60


class Unavailable(Exception):
    """Something is missing here."""


class Work:
    """Runs vfengine.train in a folder, against the clock."""

    def __init__(self, folder: Path):
        self.folder, self.end = folder, time.monotonic() + SECONDS

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def start(self, name: str, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "vfengine.train", "--output", str(self.folder / name)]
        command += ["--device", DEVICE, *flags]
        return subprocess.Popen(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)

    def finish(self, process: subprocess.Popen, name: str) -> None:
        """Waits for it. Raises Unavailable for a missing package, RuntimeError for what fails."""
        said = process.communicate()[1]
        print(said, file=sys.stderr)
        if process.returncode:
            last = (said.strip().splitlines() or [""])[-1]
            kind = Unavailable if "No module named" in said or "is needed" in said else RuntimeError
            raise kind(f"{name}: {last}")

    def run(self, name: str, seconds: float, *flags: str) -> Path:
        """A training of at most so many seconds; returns its checkpoint."""
        start = time.monotonic()
        self.finish(self.start(name, "--max-minutes", str(seconds / 60), *flags), name)
        self.tell(name, time.monotonic() - start)
        return self.folder / name / "checkpoint"

    def lines(self, name: str) -> list[dict]:
        log = self.folder / name / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [line for line in lines if "step" in line]

    def tell(self, name: str, seconds: float) -> None:
        """What the last line of its log says."""
        emit("default model", name, "time", seconds, "s")
        for key, value in (self.lines(name) or [{}])[-1].items():
            if isinstance(value, (int, float)):
                unit = "1/s" if key == "clips_per_second" else ""
                emit("default model", name, key, value, unit)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder))
        try:
            train(work)
        except Unavailable as missing:
            emit("default model", status="unavailable", note=str(missing))
        finally:
            _keep(work.folder)


def train(work: Work) -> None:
    make = _tiny_part if DRY else _part
    autoencoder, text = (make(work, name) for name in ("autoencoder", "text"))
    parts = ["--autoencoder", str(autoencoder), "--text-encoder", str(text)]
    common = [*parts, *MODEL, *RATES, "--clips-cache", str(work.folder / "clips")]
    if start := os.environ.get("VFENGINE_INIT_FROM"):
        common += ["--init-from", start]
    work.run("latents", 0, *common, "--sample-every", "0")  # makes them, and trains nothing
    flags = {
        "base": [*common, "--train", "base", *BATCH["base"]],
        "residual": [*common, "--train", "residual", *BATCH["residual"]],
    }
    steps = _count_steps(work, flags)
    seconds = work.left - SAVING
    limit = ["--max-minutes", str(max(seconds, 0) / 60), "--sample-every", "1000000"]
    started = time.monotonic()
    running = {
        name: work.start(name, *flags[name], *limit, "--steps", str(steps[name])) for name in flags
    }
    for name, process in running.items():
        work.finish(process, name)
        work.tell(name, time.monotonic() - started)
    base, residual = (work.folder / name / "checkpoint" for name in flags)
    merge = ["--init-from", str(base), "--residual-from", str(residual), "--sample-every", "0"]
    work.run("merged", 0, *parts, *MODEL, "--clips-cache", str(work.folder / "clips"), *merge)


def _part(work: Work, name: str) -> Path:
    """The checkpoint of a part: the environment's, or one that is trained now."""
    variable = {"autoencoder": "VFENGINE_AUTOENCODER", "text": "VFENGINE_TEXT_ENCODER"}[name]
    if given := os.environ.get(variable):
        return Path(given)
    return work.run(name, SECONDS * SHARES[name], "--objective", name)


def _tiny_part(work: Work, name: str) -> Path:
    """One with random weights: to train it would take longer than a dry run may."""
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

    folder = work.folder / f"tiny {name}"
    if name == "text":
        config = TextEncoderConfig(4, 8, 16, 1, 2, 16, causal=False)
        words = word_tokenizer_json(["person", "kicking"])
        save_text_encoder(folder, config, TextEncoder(config).state_dict(), words)
    else:
        config = AutoencoderConfig(
            block_out_channels=(8, 16, 16), layers_per_block=1, norm_groups=8, mid_attention=False
        )
        network = Autoencoder(config, Decoder(config), Encoder(config))
        save_autoencoder(folder, config, network.state_dict(), (0.0,) * 4, (1.0,) * 4)
    return folder


def _count_steps(work: Work, flags: dict[str, list[str]]) -> dict[str, int]:
    """How many steps each network will take beside the other in the time that is left."""
    trial = ["--steps", str(TRIAL_STEPS), "--log-every", str(max(1, TRIAL_STEPS // 3))]
    trial += ["--sample-every", "0"]
    running = {name: work.start(f"trial {name}", *flags[name], *trial) for name in flags}
    rates = {}
    for name, process in running.items():
        work.finish(process, name)
        batch = int(flags[name][flags[name].index("--batch-size") + 1])
        rates[name] = work.lines(f"trial {name}")[-1]["clips_per_second"] / batch
    seconds = max(work.left - SAVING, 1)
    most = TRIAL_STEPS if DRY else 10**6
    return {name: min(max(1, int(0.85 * rate * seconds)), most) for name, rate in rates.items()}


def _keep(folder: Path) -> None:
    """Logs, samples and the last checkpoint, to the folder of gpu.jsonl."""
    out = Path(os.environ["VFENGINE_GPU_OUT"]) / "train"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for run in sorted(path for path in folder.iterdir() if (path / "log.jsonl").is_file()):
        shutil.copy(run / "log.jsonl", out / f"{run.name}.jsonl")
        for sheet in run.glob("samples/*"):
            shutil.copy(sheet, out / f"{run.name}-{sheet.name}")
    found = [folder / name / "checkpoint" for name in ("merged", "residual", "base", "autoencoder")]
    for checkpoint in [path for path in found if path.is_dir()][:1]:
        whole = folder / "model.tar"
        with tarfile.open(whole, "w") as archive:
            archive.add(checkpoint, "checkpoint")
        with whole.open("rb") as file:
            for number, piece in enumerate(iter(lambda: file.read(PIECE), b"")):
                (out / f"model.tar.{number:02}").write_bytes(piece)


if __name__ == "__main__":
    main()
