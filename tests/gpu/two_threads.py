"""Two threads, each with a pipeline of its own, sample at once: the clips of each alone.

    python tests/gpu/two_threads.py DEVICE [FOLDER ...]

FOLDERs are where to import from. Exit status 0 if all clips are the same; test_capture.py runs it.
"""

import faulthandler
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

sys.path += sys.argv[2:]

import torch

from vfengine.pipeline import VideoFusionPipeline

LABELS = ("cartwheel", "jump")
ROUNDS = 3
SECONDS = 120
TOLERANCE = 0.05  # of pixels in bf16, where a library chooses another algorithm; 0 is expected


def pipeline(device: str) -> VideoFusionPipeline:
    return VideoFusionPipeline.from_pretrained(device=device, dtype=torch.bfloat16, capture=True)


def clip(pipe: VideoFusionPipeline, label: str, seed: int) -> torch.Tensor:
    settings = {"num_inference_steps": 4, "base_path": "stepwise", "output_type": "pt"}
    return pipe(label, base_seed=seed, offload_base=False, **settings).frames.cpu()


def alone(device: str, label: str) -> list[torch.Tensor]:
    pipe = pipeline(device)
    return [clip(pipe, label, seed) for seed in range(ROUNDS)]


def together(device: str) -> list[list[torch.Tensor]]:
    """Both threads begin at the same moment, and so do their captures; then they replay."""
    start = Barrier(len(LABELS), timeout=SECONDS)

    def work(label: str) -> list[torch.Tensor]:
        pipe = pipeline(device)
        start.wait()
        return [clip(pipe, label, seed) for seed in range(ROUNDS)]

    with ThreadPoolExecutor(len(LABELS)) as pool:
        return list(pool.map(work, LABELS))


def main() -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # where both wait for each other
    device = sys.argv[1]
    expected = [alone(device, label) for label in LABELS]
    for _ in range(2):
        for ours, theirs in zip(together(device), expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                largest = (a - b).abs().max().item()
                if not largest <= TOLERANCE:
                    raise SystemExit(f"clips differ by {largest:.3g}, tolerated {TOLERANCE}")
                if largest > 0:
                    print(f"not the same bits: {largest:.3g}")
    print("the same clips")


if __name__ == "__main__":
    main()
