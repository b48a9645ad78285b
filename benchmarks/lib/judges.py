"""Two networks that read clips: what somebody does, and what colours and place there are.

Both learn from rendered clips of a seed that no model has seen, half of them blurred or noisy as
generated ones may be. Clips are uint8 [M, N, H, W, 3]; a judge sees them at a size of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from vfengine.files import replacing
from vfengine.media.pictures import pixels_to_network
from vfengine.training.mocap import ACTIONS, Renderer, Scene, draw_scene, render_clips
from vfengine.training.mocap.scenes import COLOURS, HAIR, PLACES, WALLS

TRAIN_SEED = 1_000  # of the judges' scenes; models are trained on seed 0
ATTRIBUTES = {  # what can be read: the values that it may have
    "top_colour": tuple(COLOURS),
    "bottom_colour": tuple(COLOURS),
    "hair": tuple(HAIR),
    "place": tuple(PLACES),
    "wall": ("", *WALLS),  # none on a lawn
}

# the first of ATTRIBUTES: two colours for each, to see where it is
_WORN = {"top_colour": ("white", "black"), "bottom_colour": ("white", "black")}
_WORN |= {"hair": ("grey", "black")}


def _layer(inputs: int, outputs: int, side: int, stride: int = 2, dilation: int = 1) -> nn.Module:
    padding = side // 2 * dilation
    conv = nn.Conv2d(inputs, outputs, side, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _layer_in_time(inputs: int, outputs: int, stride: int) -> nn.Module:
    conv = nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(outputs), nn.ReLU())


class ActionJudge(nn.Module):
    """Clips [B, N, 3, 64, 64] in -1..1, N >= 2 -> logits [B, 15].

    It sees by how much frames differ from those before them, and nothing else. All frozen clips are
    the same to it, so poses and rooms cannot tell it the action.
    """

    size = 64

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Sequential(_layer(3, 24, 5), _layer(24, 48, 3), _layer(48, 96, 3))
        self.motion = nn.Sequential(_layer_in_time(96, 128, 2), _layer_in_time(128, 64, 1))
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(128, len(ACTIONS)))

    def features(self, clips: Tensor) -> Tensor:
        """[B, 128]: the strongest answers in both halves of the clip."""
        change = 2 * (clips[:, 1:] - clips[:, :-1])
        cells = self.frames(change.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        cells = cells.unflatten(0, change.shape[:2]).transpose(1, 2)
        return F.adaptive_max_pool3d(self.motion(cells), (2, 1, 1)).flatten(1)

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.features(clips))


class AttributeJudge(nn.Module):
    """Frames of a clip [B, F, 3, 128, 128] in -1..1 -> logits [B, values] for each of ATTRIBUTES.

    It sees each frame and how that differs from the mean of all, which shows where somebody moves.
    For each attribute it looks at the cells of all frames that tell of it (attention with a learned
    query, which is shown in training where the garments are); and at each feature's mean and
    maximum over all cells.
    """

    size = 128
    num_frames = 3

    def __init__(self) -> None:
        super().__init__()
        self.fine = _layer(6, 48, 7, stride=4)  # colours, at 32 x 32 cells
        self.coarse = nn.Sequential(  # and what they belong to, at 16 x 16
            _layer(48, 96, 3),
            _layer(96, 96, 3, stride=1, dilation=2),
            _layer(96, 96, 3, stride=1, dilation=4),
        )
        self.cells = _layer(48 + 96, 96, 1, stride=1)
        self.where = nn.Conv2d(96, len(ATTRIBUTES), 1)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(3 * 96, 96), nn.ReLU(), nn.Linear(96, len(values)))
                for name, values in ATTRIBUTES.items()
            }
        )

    def read(self, frames: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Logits, features [B, 192], and where it looks.

        The last is the logarithm of its attention to the F * 32 * 32 cells, [B, attributes, cells].
        """
        x = torch.cat([frames, 2 * (frames - frames.mean(1, keepdim=True))], 2)
        fine = self.fine(x.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        coarse = F.interpolate(self.coarse(fine), scale_factor=2.0, mode="nearest")
        cells = self.cells(torch.cat([fine, coarse], 1))
        where = self.where(cells)
        shape = frames.shape[:2]
        cells, where = (x.unflatten(0, shape).transpose(1, 2).flatten(2) for x in (cells, where))
        looked = where.softmax(-1) @ cells.transpose(1, 2)
        features = torch.cat([cells.mean(-1), cells.amax(-1)], 1)
        logits = {
            name: head(torch.cat([looked[:, i], features], 1))
            for i, (name, head) in enumerate(self.heads.items())
        }
        return logits, features, where.float().log_softmax(-1)

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        return self.read(frames)[0]


# -- reading ---------------------------------------------------------------------------------------


def to_input(clips: np.ndarray, size: int) -> Tensor:
    """uint8 [B, N, H, W, 3] -> [B, N, 3, size, size] in -1..1; smaller sizes average areas."""
    x = pixels_to_network(torch.from_numpy(np.ascontiguousarray(clips)))
    return F.interpolate(x.flatten(0, 1), (size, size), mode="area").unflatten(0, x.shape[:2])


@torch.inference_mode()
def read_actions(judge: ActionJudge, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The action seen in each clip, int64 [M], an index into ACTIONS; and features [M, 128]."""
    parts = (clips[i : i + 30] for i in range(0, len(clips), 30))
    features = torch.cat([judge.features(to_input(part, judge.size)) for part in parts])
    return judge.head(features).argmax(1).numpy(), features.numpy()


@torch.inference_mode()
def read_attributes(judge: AttributeJudge, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is seen in three frames of each clip, int64 [M, attributes]; and features [M, 192].

    An entry is an index into the values of its attribute in ATTRIBUTES.
    """
    chosen = np.linspace(0, clips.shape[1] - 1, judge.num_frames).round().astype(int)
    seen, features = [], []
    for i in range(0, len(clips), 30):
        logits, found, _ = judge.read(to_input(clips[i : i + 30, chosen], judge.size))
        seen.append(torch.stack([values.argmax(1) for values in logits.values()], 1))
        features.append(found)
    return torch.cat(seen).numpy(), torch.cat(features).numpy()


def attributes_of(scenes: Sequence[Scene]) -> np.ndarray:
    """What there is to see in scenes, as `read_attributes` gives it."""
    rows = [[v.index(getattr(s, name)) for name, v in ATTRIBUTES.items()] for s in scenes]
    return np.array(rows, np.int64)


# -- training --------------------------------------------------------------------------------------


def train_action_judge(num_clips: int, steps: int, batch: int = 32) -> ActionJudge:
    """Cross-entropy on rendered clips, whose colour channels change places."""
    with tqdm(total=num_clips, desc="clips for the action judge", disable=None) as bar:
        clips, labels = render_clips(num_clips, TRAIN_SEED, size=64, progress=bar.update)
    targets = torch.from_numpy(labels)
    torch.manual_seed(0)
    judge = ActionJudge()

    def loss(rng: np.random.Generator) -> Tensor:
        chosen = rng.integers(0, num_clips, batch)
        x = degraded(to_input(clips[chosen], judge.size), rng)[:, :, rng.permutation(3)]
        return F.cross_entropy(judge(x).float(), targets[chosen], label_smoothing=0.05)

    return _train(judge, loss, steps, "action judge")


def train_attribute_judge(num_scenes: int, steps: int, batch: int = 32) -> AttributeJudge:
    """Cross-entropy on some frames of each scene; every pair of garments' colours occurs.

    For what garments there are, attention learns from where they are: from colours alone it would
    take many times as long to find out that hair has one.
    """
    frames, places, targets = _attribute_examples(num_scenes)
    torch.manual_seed(0)
    judge = AttributeJudge()

    def loss(rng: np.random.Generator) -> Tensor:
        chosen = rng.integers(0, num_scenes, batch)
        x, there = degraded(to_input(frames[chosen], judge.size), rng), places[chosen].float()
        if rng.uniform() < 0.5:  # left and right exchanged
            x, there = x.flip(-1), there.flip(-1)
        logits, _, where = judge.read(x)
        named = sum(
            F.cross_entropy(values.float(), targets[chosen, i], label_smoothing=0.05)
            for i, values in enumerate(logits.values())
        )
        found = -(there.flatten(2) * where[:, : len(_WORN)]).sum(-1).mean() / 2
        return named / len(ATTRIBUTES) + found

    return _train(judge, loss, steps, "attribute judge")


def _attribute_examples(num_scenes: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Frames, where what is worn is in them, and attributes.

    They are uint8 [M, 3, 128, 128, 3] at random times, fp16 [M, worn, 3, 32, 32] of sum 1 (0 for
    what is out of sight), and int64 [M, attributes].
    """
    # a seventh of all pairs of colours is held out from models, so a seventh of scenes
    scenes = [draw_scene(TRAIN_SEED, i, held_out=i % 7 == 0) for i in range(num_scenes)]
    renderer, rng = Renderer(AttributeJudge.size), np.random.default_rng(0)
    count = AttributeJudge.num_frames
    frames = np.empty((num_scenes, count, renderer.size, renderer.size, 3), np.uint8)
    places = torch.empty(num_scenes, len(_WORN), count, 32, 32, dtype=torch.float16)
    with tqdm(total=num_scenes, desc="frames for the attribute judge", disable=None) as bar:
        for first in range(0, num_scenes, 5):
            part = scenes[first : first + 5]
            times = np.sort(rng.choice(renderer.num_frames, count, replace=False)).tolist()
            shown = renderer.frames(part, times)
            for i, (name, colours) in enumerate(_WORN.items()):
                # where a garment is, the picture changes with its colour
                other = [_recoloured(scene, name, colours) for scene in part]
                changed = (renderer.frames(other, times) != shown).any(-1).float()
                share = F.avg_pool2d(changed, renderer.size // 32)
                total = share.sum((1, 2, 3), keepdim=True).clamp(min=1e-6)
                places[first : first + 5, i] = share / total
            frames[first : first + 5] = shown.numpy()
            bar.update(len(part))
    return frames, places, torch.from_numpy(attributes_of(scenes))


def _recoloured(scene: Scene, name: str, colours: tuple[str, str]) -> Scene:
    """The scene in the first of two colours, or in the second if it has that already."""
    return replace(scene, **{name: colours[getattr(scene, name) == colours[0]]})


def _train(judge: nn.Module, loss_of: Callable, steps: int, name: str) -> nn.Module:
    """AdamW, one cycle of the learning rate; loss_of(rng) is the loss of a batch."""
    rng = np.random.default_rng(0)
    judge.train()
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=steps, pct_start=0.15
    )
    for _ in (bar := tqdm(range(steps), desc=name, disable=None)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return judge.eval()


def degraded(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of all batches are blurred, noisy or both; x [B, N, 3, H, W]."""
    kind = rng.integers(0, 6)
    if kind in (0, 1):
        x = blurred(x.flatten(0, 1)).view_as(x)
    if kind in (1, 2):
        x = x + rng.uniform(0.02, 0.15) * torch.randn_like(x)
    return x


def blurred(planes: Tensor) -> Tensor:
    """Pictures [B, C, H, W] brought to half their size and back."""
    return F.interpolate(F.avg_pool2d(planes, 2), planes.shape[2:], mode="bilinear")


def kept_judge(file: Path, judge: nn.Module, train: Callable[[], nn.Module]) -> nn.Module:
    """The judge of a file, or the one that train() gives, which is then kept there."""
    if file.exists():
        judge.load_state_dict(load_file(file))
        return judge.eval()
    judge = train()
    state = {name: value.contiguous() for name, value in judge.state_dict().items()}
    with replacing(file) as temporary:
        save_file(state, temporary)
    return judge
