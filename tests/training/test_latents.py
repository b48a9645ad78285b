"""training/parts.py and latents.py: clips become latents, captions token states, made once."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_parts import (
    LATENT_MEAN,
    LATENT_STD,
    save_tiny_parts,
    tiny_autoencoder,
    tiny_text_encoder,
)

from vfengine.training.batch import Latents
from vfengine.training.latents import make_latents, residual_std
from vfengine.training.parts import Coder, Parts

NUM_FRAMES, SIZE = 4, 16


class Squares:
    """Clips of moving squares by number, as `CaptionedMocap` gives clips; counts what is drawn."""

    name = captions_name = f"squares-{NUM_FRAMES}x{SIZE}"

    def __init__(self):
        self.drawn = []

    def frames(self, indices, only_base=False):
        self.drawn += indices
        clips = np.full((len(indices), NUM_FRAMES, SIZE, SIZE, 4), 40, np.uint8)
        clips[..., 3] = 0
        for clip, index in zip(clips, indices, strict=True):
            for i in range(NUM_FRAMES):
                left = 2 * i + index % 3
                clip[i, 4:10, left : left + 6] = (220, 120, 10 * index, 255)
        return torch.from_numpy(clips[:, NUM_FRAMES // 2 :][:, :1] if only_base else clips)

    def captions(self, index, count):
        return [
            ("a person kicking", "a person", "red", "blue lawn")[(index + i) % 4]
            for i in range(count)
        ]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return Parts.read(*save_tiny_parts(tmp_path_factory.mktemp("parts")))


@pytest.fixture(scope="module")
def coder(parts) -> Coder:
    return Coder(parts)


def test_frames_are_encoded_to_unit_scale(coder):
    pixels = Squares().frames([0, 1])[..., :3]
    latents = coder.encode(pixels)
    assert latents.dtype == torch.float16 and latents.shape == (2, NUM_FRAMES, 4, 4, 4)
    x = pixels.movedim(-1, -3).float() / 127.5 - 1
    with torch.no_grad():
        z = tiny_autoencoder().half().float().encode(x)  # as it is on disk
    mean, std = (torch.tensor(v).view(4, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
    torch.testing.assert_close(latents.float(), (z - mean) / std, rtol=0, atol=0.03)


def test_latents_are_decoded_to_frames(coder):
    latents = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    frames = coder.decode(latents)
    assert frames.dtype == torch.uint8 and frames.shape == (2, 3, SIZE, SIZE, 3)
    mean, std = (torch.tensor(v).view(4, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
    with torch.no_grad():
        x = tiny_autoencoder().half().float().decode(latents.float() * std + mean)
    expected = (x.clamp(-1, 1) + 1) * 127.5
    assert (frames.movedim(-1, -3).float() - expected).abs().max() < 4


def test_texts_become_token_states(coder):
    states = coder.states(["a person kicking", "", "a person kicking"])
    assert states.dtype == torch.float16 and states.shape == (3, 8, 16)
    assert torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])
    with torch.no_grad():
        none = tiny_text_encoder().half().float()(torch.zeros(1, 8, dtype=torch.int64))
    torch.testing.assert_close(states[1:2].float(), none, rtol=0, atol=0.05)


def test_clips_are_encoded_once(parts, coder, tmp_path):
    source, done = Squares(), []
    made = make_latents(source, parts, coder, tmp_path, 10, 3, done.append)
    assert made.shape == (10, NUM_FRAMES, 4, 4, 4)
    assert made.captions.shape == (10, 3, 8, 16) and made.null.shape == (8, 16)
    assert source.drawn == list(range(10))  # in some chunks, each clip once
    assert sum(done) == 20
    assert torch.equal(made.clips[7], coder.encode(Squares().frames([7])[..., :3])[0])
    told = coder.states(source.captions(7, 3))
    assert torch.equal(made.captions[7], told)
    assert torch.equal(made.null, coder.states([""])[0])
    found = make_latents(source, parts, coder, tmp_path, 10, 3, done.append)
    assert len(source.drawn) == 10 and sum(done) == 20
    assert torch.equal(found.clips, made.clips) and torch.equal(found.captions, made.captions)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".npy", ".npy"]


def test_base_frames_of_further_clips_are_encoded_alone(parts, coder, tmp_path):
    made = make_latents(Squares(), parts, coder, tmp_path, 2, 1, num_images=3)
    assert made.shape == (2, NUM_FRAMES, 4, 4, 4) and made.images.shape == (3, 1, 4, 4, 4)
    further = Squares().frames([2, 3, 4])[:, NUM_FRAMES // 2, ..., :3]
    assert torch.equal(made.images.clips[:, 0], coder.encode(further))
    x, context, _ = made.take(np.random.default_rng(0), 50, 0.0, NUM_FRAMES // 2)
    assert all((image == made.images.clips[:, 0]).flatten(1).all(1).any() for image in x)
    assert all((row == made.images.captions[:, 0]).flatten(1).all(1).any() for row in context)
    clips, _, _ = made.take(np.random.default_rng(0), 5, 0.0, None)
    assert clips.shape == (5, NUM_FRAMES, 4, 4, 4)


def test_figure_is_known_as_shares_of_cells(parts, coder, tmp_path):
    made = make_latents(Squares(), parts, coder, tmp_path, 2, 1, num_images=1)
    assert made.figure.shape == (2, NUM_FRAMES, 1, 4, 4) and made.figure.dtype == torch.float16
    # rows 4 to 10 and columns 0 to 6 of 16 pixels, in cells of 4
    expected = torch.zeros(4, 4)
    expected[1, 0] = 1
    expected[1, 1] = expected[2, 0] = 0.5
    expected[2, 1] = 0.25
    torch.testing.assert_close(made.figure[0, 0, 0].float(), expected, rtol=0, atol=1e-3)
    _, _, figure = made.take(np.random.default_rng(0), 3, 0.0, NUM_FRAMES // 2)
    assert torch.equal(figure, made.images.figure[:, 0].expand(3, -1, -1, -1))


def test_other_parts_make_files_of_their_own(parts, coder, tmp_path):
    make_latents(Squares(), parts, coder, tmp_path, 2, 1)
    others = Parts.read(*save_tiny_parts(tmp_path / "others", seed=1))
    make_latents(Squares(), others, Coder(others), tmp_path, 2, 1)
    assert len(list(tmp_path.glob("*.npy"))) == 4


def test_file_that_is_cut_off_is_refused(parts, coder, tmp_path):
    make_latents(Squares(), parts, coder, tmp_path, 2, 1)
    file = next(tmp_path.glob("clips-*"))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"no complete \.npy file, remove it"):
        make_latents(Squares(), parts, coder, tmp_path, 2, 1)
    np.save(file, np.zeros((3, 2), np.float16))
    with pytest.raises(ValueError, match=r"expected float16 \(2, 2\): remove it"):
        make_latents(Squares(), parts, coder, tmp_path, 2, 1)


def test_interrupted_making_leaves_nothing(parts, coder, tmp_path):
    def interrupted(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_latents(Squares(), parts, coder, tmp_path, 6, 1, interrupted)
    assert not list(tmp_path.iterdir())


def test_residual_std_is_that_of_changes():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 1, 4, 4, 4, generator=generator)
    change = 0.5 * torch.randn(300, 5, 4, 4, 4, generator=generator)
    change[:, 2] = 0
    clips = (base + change).half()
    latents = Latents(clips, torch.zeros(300, 1, 1, 1), torch.zeros(1, 1), clips[:, :, :1])
    assert residual_std(latents) == pytest.approx(0.5, abs=0.02)


def test_batch_takes_captions_and_the_empty_prompt():
    clips = torch.arange(8).view(8, 1, 1, 1, 1).expand(8, 3, 1, 2, 2).half()
    captions = (torch.arange(8)[:, None] * 10 + torch.arange(1, 4))[..., None, None].half()
    null = torch.full((1, 1), -1.0).half()
    latents = Latents(clips, captions, null, torch.zeros_like(clips))
    x, context, _ = latents.take(np.random.default_rng(0), 400, 0.25, None)
    assert x.shape == (400, 3, 1, 2, 2) and context.shape == (400, 1, 1)
    context, number = context.flatten(), x[:, 0, 0, 0, 0]
    dropped = context == -1
    assert 0.18 < float(dropped.float().mean()) < 0.32
    assert torch.equal((context[~dropped] / 10).floor(), number[~dropped])
    assert set((context[~dropped] % 10).tolist()) == {1, 2, 3}
    base, _, _ = latents.take(np.random.default_rng(0), 400, 0.25, 1)
    assert torch.equal(base, x[:, 1])


def test_digests_of_parts_do_not_depend_on_the_order_of_their_weights(parts):
    states = ("autoencoder_state", "text_state")
    state = {name: dict(reversed(getattr(parts, name).items())) for name in states}
    assert replace(parts, **state).digests() == parts.digests()
    changed = {name: value + 1 for name, value in parts.text_state.items()}
    assert replace(parts, text_state=changed).digests() != parts.digests()
