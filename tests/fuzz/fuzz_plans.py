"""Random UNets in random forms: a planned one gives the plain one's result, or the same refusal."""

from __future__ import annotations

import copy
import math
import random
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from seeded import filled, normal
from test_planned import BF16_ISAS, FORMS, cast, distance, exact_result
from torch import Tensor

from vfengine.models import PlannedUNet, UNet, UNetConfig
from vfengine.native import vfengine_native
from vfengine.plan import network as planned

# What plans refuse by name though the plain network runs.
NO_KERNEL = ("bfloat16 products take rows of even width", "plan: expected one buffer")
# What torch's norm refuses and a plan does: the norm of one number is its bias.
ONE_NUMBER = "Expected more than 1 value per channel"
# Distances that are not looked into: of thousands of fp32 networks, one is off by 1.2e-5.
LEAST = {torch.float32: 2e-5, torch.bfloat16: 0.02}
SHAPES = 3  # that each network is given, one after the other
MOST_WEIGHTS = 60_000  # of a network of a case, about


def config(chance: random.Random) -> dict[str, Any]:
    """Entries of a small UNetConfig, any combination of which may be refused."""
    levels = chance.choice((1, 1, 2, 2, 2, 3))
    pick = chance.choice
    groups, head = pick((1, 2, 4, 8)), pick((1, 2, 3, 4, 5, 8, 8, 12, 16, 20))
    unit = math.lcm(groups, head)
    widths = [max(2, unit * chance.randint(1, max(1, 24 // unit))) for _ in range(levels)]
    video = chance.random() < 0.6
    entries = {
        "in_channels": chance.randint(1, 6),
        "out_channels": chance.randint(1, 6),
        "block_out_channels": widths,
        "layers_per_block": [pick((0, 1, 1, 2)) for _ in range(levels)],
        "patch_size": pick((1, 1, 2, 3, 4)),
        "spatial_attention": [chance.random() < 0.5 for _ in range(levels)],
        "temporal_attention": [video and chance.random() < 0.5 for _ in range(levels)],
        "temporal_conv": [video and chance.random() < 0.3 for _ in range(levels)],
        "temporal_conv_depth": chance.randint(1, 3),
        "frame_embedding": video and chance.random() < 0.5,
        "num_classes": pick((None, None, 1, 4)),
        "context_dim": pick((None, None, 1, 5, 12)),
        "position_buckets": pick((0, 4, 5, 32)),
        "head_dim": head,
        "norm_groups": groups,
        "feed_forward_mult": pick((0, 1, 2, 4)),
        "scale_shift": chance.random() < 0.5,
        "temporal_feed_forward": chance.random() < 0.7,
        "mid_blocks": pick((0, 1, 2, 2, 3)),
        "temporal_self_attentions": pick((1, 1, 2)),
        "norm_over_frames": chance.random() < 0.3,
        "sin_first": chance.random() < 0.3,
        "frequency_shift": pick((None, 0, 1.0)),
        "norm_eps": pick((1e-3, 1e-2)),  # at less, a group of nearly equal numbers is all rounding
        "transformer_norm_eps": pick((1e-3, 1e-2)),
        "any_size": chance.random() < 0.4,
    }
    if chance.random() < 0.3:
        fitting = [h for h in (1, 2, 4, 8, 12) if all(w % h == 0 for w in widths)]
        entries["head_dims"] = [pick(fitting or [1]) for _ in range(levels)]
    if chance.random() < 0.3:
        entries["transformer_depths"] = [chance.randint(1, 2) for _ in range(levels)]
    if video and chance.random() < 0.3:
        entries["transformer_in_heads"] = chance.randint(1, 4)
    for name in ("mid_spatial_attention", "mid_temporal_attention"):
        if chance.random() < 0.2:
            entries[name] = pick((True, False)) if video else pick((None, False))
    if chance.random() < 0.2:
        kind = entries["class_embedding"] = pick(("table", "timestep", "projection"))
        entries["class_features"] = 3 if kind == "projection" else None
        entries["num_classes"] = 4 if kind == "table" else entries["num_classes"]
    return entries


def small_config(chance: random.Random) -> dict[str, Any]:
    """The first of a few that is small."""
    for _ in range(100):
        entries = config(chance)
        widths, first = entries["block_out_channels"], entries["block_out_channels"][0]
        block = 44 + 6 * entries["feed_forward_mult"] * max(entries.get("transformer_depths", [1]))
        blocks = [2 * layers + 1 for layers in entries["layers_per_block"]]
        blocks[-1] += entries["mid_blocks"]
        weights = sum(
            n * (block * w * w + 8 * first * w) for n, w in zip(blocks, widths, strict=True)
        )
        if weights <= MOST_WEIGHTS:
            break
    return entries


def inputs(chance: random.Random, shape: UNetConfig) -> dict[str, Any]:
    """Of a size that the network takes, mostly."""
    batch, seed = chance.choice((1, 2, 2, 3)), chance.randrange(1000)
    multiple = shape.size_multiple if chance.random() < 0.95 else 1
    height, width = (multiple * chance.randint(1, max(1, 12 // multiple)) for _ in range(2))
    frames = (chance.choice((1, 2, 3, 5, 8, 17)),) if shape.is_video else ()
    values = {"x": normal(batch, *frames, shape.in_channels, height, width, seed=seed)}
    values["t"] = torch.tensor([chance.randrange(1000) for _ in range(batch)])
    if shape.context_dim is not None and chance.random() < 0.8:
        length = chance.choice((1, 2, 7, 77))
        values["context"] = normal(batch, length, shape.context_dim, seed=seed + 1)
    kind, classes = shape.class_embedding, shape.num_classes
    if kind == "projection":
        values["class_labels"] = normal(batch, shape.class_features, seed=seed + 2)
    elif kind == "timestep" or classes is not None:
        labels = [chance.randrange(classes or 9) for _ in range(batch)]
        values["class_labels"] = torch.tensor(labels)
    if chance.random() < 0.05:
        values.pop(chance.choice(sorted(values.keys() - {"x", "t"})), None) if len(
            values
        ) > 2 else 0
    return values


def case(chance: random.Random, folder: Path | None = None, isas: tuple[str, ...] = ()) -> str:
    """isas: instruction sets of which one is taken; none are all that run here"""
    torch.set_num_threads(1)
    entries = small_config(chance)
    isa = chance.choice(isas or vfengine_native.cpu_isas)
    bf16 = isa in BF16_ISAS and chance.random() < 0.5
    form, threads = chance.choice(sorted(FORMS)), chance.choice((1, 1, 2))
    told = f"{isa}, {'bf16' if bf16 else 'fp32'}, {form}, {threads} threads, {entries}"
    try:
        shape = UNetConfig(**entries)
    except ValueError:
        return "refused"
    try:
        return _compared(chance, shape, isa, bf16, form, threads)
    except ValueError as error:  # of weights that no kernel of this dtype takes
        assert str(error).startswith(NO_KERNEL), f"{told}: {error}"
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error


def _compared(
    chance: random.Random, shape: UNetConfig, isa: str, bf16: bool, form: str, threads: int
) -> str:
    seed = chance.randrange(1000)
    unet = filled(UNet(shape), seed=seed)
    calls = [inputs(chance, shape) for _ in range(SHAPES)]
    expected = [_outcome(unet, values) for values in calls]
    vfengine_native.set_cpu_isa(isa)
    dtype = torch.bfloat16 if bf16 else torch.float32
    words = []
    with warnings.catch_warnings(), mock.patch.object(planned, "_TILED", FORMS[form]):
        warnings.simplefilter("ignore")
        made = PlannedUNet(unet, dtype)
        for values, wanted in zip(calls, expected, strict=True):
            torch.set_num_threads(threads)
            result = _outcome(made, values)
            again = _outcome(made, values)
            torch.set_num_threads(1)
            told = {name: list(value.shape) for name, value in values.items()}
            if isinstance(wanted, str) or isinstance(result, str):
                plain_alone = str(wanted).startswith(ONE_NUMBER)
                plan_alone = str(result).startswith(NO_KERNEL)
                assert plain_alone or plan_alone or result == wanted, f"{told}: {wanted}, {result}"
                words.append("refused")
                continue
            assert result.shape == wanted.shape and result.dtype is torch.float32, told
            assert result.isfinite().all() and torch.equal(result, again), told
            bound, off = LEAST[dtype], distance(result, wanted)
            if off > bound:
                fresh = filled(UNet(shape), seed=seed)
                off = distance(result, exact_result(fresh, values))
                bound = max(bound, 2 * _off_in_plain_torch(fresh, values, dtype))
            assert off <= bound, f"{told}: off by {off:.3g}, bound {bound:.3g}"
            words.append("done")
    return f"{words.count('done')} of {SHAPES} done"


def _outcome(unet: UNet | PlannedUNet, values: dict[str, Any]) -> Tensor | str:
    """The result, or the ValueError's text."""
    try:
        with torch.no_grad():
            return unet(**values)
    except ValueError as error:
        return str(error)


def _off_in_plain_torch(unet: UNet, values: dict[str, Any], dtype: torch.dtype) -> float:
    """How far PyTorch in this dtype is off at most, also where x differs by a few roundings.

    Some of these networks divide by almost nothing. Of two inputs that differ by a rounding, the
    result of one may then be off several times as far as that of the other.
    """
    plain, distances = copy.deepcopy(unet).to(dtype), []
    for roundings in range(-12, 12):
        moved = {**values, "x": values["x"] * (1 + roundings * torch.finfo(dtype).eps)}
        with torch.no_grad():
            off = distance(plain(**cast(moved, dtype)), exact_result(unet, moved))
        distances.append(math.inf if math.isnan(off) else off)
    return max(distances)
