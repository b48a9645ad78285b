"""python -m vfengine.generate and its phases: windows, overlap, memory, plain video, progress."""

import os

import numpy as np
import pytest
import tqdm
from command_line import STEPS, WALK, done, frames_of, refused
from conftest import ON_CPU

import vfengine as vf
from vfengine.pipelines.videofusion import to_uint8

# -- windows, overlapped phases, the base network in memory ----------------------------------------


def test_windows(cli, tiny_checkpoint):
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    made = set()
    for flags, window, overlap in (
        ([], 4, 3),
        (["--window", 0], 0, None),
        (["--window", 5, "--window-overlap", 4], 5, 4),
        (["--window-overlap", 3], 4, 3),  # as without flags: the least
    ):
        record = done(cli(*WALK, "--num-frames", 9, *flags, "--output", "c.webp", "--json"))
        assert record["settings"]["window"] == window
        assert record["settings"]["window_overlap"] == overlap
        asked = {} if not flags else {"window": window, "window_overlap": overlap}
        out = pipe("walk", num_frames=9, num_inference_steps=int(STEPS), **asked)
        assert np.array_equal(frames_of("c.webp"), to_uint8(out.frames)[0])
        made.add(frames_of("c.webp").tobytes())
    assert len(made) == 3
    assert done(cli(*WALK, "--json"))["settings"]["window"] == 0


@pytest.mark.parametrize("frames", [4, 9])
def test_loops(cli, tiny_checkpoint, frames):
    made = [*WALK, "--num-frames", frames, "--output", "c.webp"]
    record = done(cli(*made, "--loop", "--json"))
    assert record["settings"]["loop"] is True
    assert (record["settings"]["window"], record["settings"]["window_overlap"]) == (4, 3)
    loop = frames_of("c.webp")
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    out = pipe("walk", num_frames=frames, num_inference_steps=int(STEPS), loop=True)
    assert np.array_equal(loop, to_uint8(out.frames)[0])
    with open("c.yaml", "w") as file:
        file.write("loop: true\n")
    assert cli(*made, "--config", "c.yaml")[0] == 0
    assert np.array_equal(frames_of("c.webp"), loop)
    cli(*made)
    assert not np.array_equal(frames_of("c.webp"), loop)


@pytest.mark.parametrize("flags", [[], ["--num-residuals", 3], ["--num-videos", 3]])
def test_overlapped_phases_give_the_same_clips(cli, flags):
    arguments = [*WALK, *flags, "--batch-size", 2, "--base-path", "stepwise", "--output"]
    cli(*arguments, "a.webp")
    both = [*arguments, "b.webp", "--overlap-phases", "--base-trajectory", "t.safetensors"]
    record = done(cli(*both, "--json"))
    assert record["settings"]["overlap_phases"] is True
    assert record["settings"]["offload_base"] is False
    assert record["timings"]["base"] == 0.0
    paths = 3 if "--num-videos" in flags else 1
    assert vf.BaseTrajectory.load("t.safetensors").final.shape[0] == paths
    names = [f"-{k:03d}.webp" for k in range(3)] if flags else [".webp"]
    for name in names:
        assert np.array_equal(frames_of(f"a{name}"), frames_of(f"b{name}"))
    assert refused(cli(*both), "overlap_phases", "a given base path is there already")
    os.unlink("t.safetensors")
    assert "both phases " in cli(*both)[1]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ([], [False]),
        (["--no-offload-base"], [True]),
        (["--num-videos", 2], [True, True]),
        (["--num-videos", 2, "--offload-base"], [False, False]),
        (["--num-videos", 2, "--batch-size", 2], [False]),
        (["--num-residuals", 2], [False, False]),
    ],
)
def test_base_network_is_let_go_unless_it_is_needed_again(cli, monkeypatch, flags, kept):
    seen = []
    sample = vf.VideoFusionPipeline.sample

    def watched(self, request, callback):
        out = sample(self, request, callback)
        seen.append("base" in self._session.networks)
        return out

    monkeypatch.setattr(vf.VideoFusionPipeline, "sample", watched)
    assert done(cli(*WALK, *flags, "--json"))["settings"]["offload_base"] is not kept[0]
    assert seen == kept


def test_no_capture(cli, monkeypatch):
    asked = []
    make = vf.VideoFusionPipeline.from_pretrained

    def watched(*args, **kwargs):
        asked.append(kwargs["capture"])
        return make(*args, **kwargs)

    monkeypatch.setattr(vf.VideoFusionPipeline, "from_pretrained", watched)
    cli(*WALK)
    assert done(cli(*WALK, "--no-capture", "--json"))["settings"]["no_capture"] is True
    assert asked == [True, False]

    def uncapturable(self, *args, **kwargs):
        raise RuntimeError("this step cannot be captured in a CUDA graph (why); …")

    monkeypatch.setattr(vf.VideoFusionPipeline, "sample", uncapturable)
    status, _, err = cli(*WALK)
    assert (status, err.endswith(": try --no-capture\n")) == (1, True)


@pytest.mark.parametrize("solver", ["dpmsolver++", "unipc"])
def test_multistep_solvers(cli, tiny_checkpoint, solver):
    assert cli(*WALK, "--solver", solver, "--output", "c.webp")[0] == 0
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    out = pipe("walk", num_inference_steps=int(STEPS), solver=solver)
    assert np.array_equal(frames_of("c.webp"), to_uint8(out.frames)[0])


# -- VDM* ------------------------------------------------------------------------------------------


def test_a_plain_video_model_is_sampled(cli, tiny_video_checkpoint):
    plain = [*WALK, "--seed", 3, "--output", "c.webp"]
    record = done(cli(*plain, "--json", model=tiny_video_checkpoint))
    assert (record["base_seed"], record["residual_seed"]) == (None, 4)
    for name in ("base_path", "window", "offload_base"):
        assert record["settings"][name] is None
    assert record["timings"]["base"] == 0.0 < record["timings"]["residual"]
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_video_checkpoint, **ON_CPU)
    out = pipe("walk", num_inference_steps=int(STEPS), residual_seed=4)
    assert np.array_equal(frames_of("c.webp"), to_uint8(out.frames)[0])
    status, out, _ = cli(*plain, "--num-videos", 2, "--num-frames", 3, model=tiny_video_checkpoint)
    assert status == 0
    assert "2 clips: 3 frames, 4 steps" in out and ", sampling " in out and "base" not in out
    assert frames_of("c-001.webp").shape == (3, 16, 16, 3)


# -- progress --------------------------------------------------------------------------------------


@pytest.fixture
def bars(monkeypatch):
    """Every progress bar made, with the totals it has announced."""
    made = []

    class Bar:
        def __init__(self, total, **_):
            self.n, self.total, self.announced = 0, total, [total]
            made.append(self)

        def update(self, n):
            self.n += n
            assert self.n <= self.total
            if self.announced[-1] != self.total:
                self.announced.append(self.total)

        def set_description(self, *_, **__):
            pass

        def close(self):
            assert self.n == self.total

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    return made


@pytest.mark.parametrize(
    ("flags", "total"),
    [
        ([], 8),
        (["--num-videos", 3, "--batch-size", 2], 16),
        (["--num-residuals", 3, "--batch-size", 2], 12),
        (["--preview", "--num-videos", 2], 8),
        (["--overlap-phases"], 8),
        (["--overlap-phases", "--num-videos", 2], 16),
        (["--overlap-phases", "--num-residuals", 3], 16),
    ],
)
def test_progress_counts_every_phase(cli, bars, flags, total):
    assert cli(*WALK, *flags)[0] == 0
    assert [bar.announced for bar in bars] == [[total]]


def test_progress_leaves_out_what_is_there_already(
    cli, bars, clean_checkpoint, tiny_video_checkpoint, picture
):
    cli(*WALK, "--image", picture[0], "--num-residuals", 2, model=clean_checkpoint)
    cli(*WALK, "--num-videos", 2, model=tiny_video_checkpoint)
    for _ in range(2):
        cli(*WALK, "--base-trajectory", "t.safetensors")
    assert [bar.announced for bar in bars] == [[8], [8], [8], [4]]
    bars.clear()
    for flags in ([], [], ["--num-residuals", 2], ["--num-videos", 2]):
        cli(*WALK, "--base-cache", "cache", *flags)
    assert [bar.announced for bar in bars] == [[8], [8, 4], [12, 8], [16, 12]]
    cli(*WALK, "--base-cache", "cache", "--preview")  # closes with 0 of 0
    assert (bars[-1].n, bars[-1].announced) == (0, [4])
