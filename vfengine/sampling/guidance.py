"""Classifier-free guidance: ε = ε_u + s (ε_c - ε_u)   (Ho & Salimans 2022, eq. 6).

ε_c is a network's estimate under a condition, ε_u the one without, or under a negative prompt.
Both come from one call on a doubled batch, which reads the weights once. That is the faster way on
CUDA and, by a few percent, on a CPU, where two calls would give the same bits. Labels and context
are read from buffers, so that one model, and the CUDA graph of its step, serves calls with others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .cuda_graph import weights_key
from .features import Kept
from .in_loop import LoopModel, Steps


@dataclass(frozen=True, eq=False)
class Condition:
    """The classes of a call's clips, and the strength of guidance.

    classes:        int64 [B], on the networks' device
    guidance_scale: s of classifier-free guidance; 1 is off
    """

    classes: Tensor
    guidance_scale: float

    @property
    def batch(self) -> int:
        """B, the number of clips."""
        return len(self.classes)

    def expand(self, batch: int) -> Condition:
        """The condition of so many clips, which share that of one."""
        return replace(self, classes=self.classes.expand(batch))

    def to(self, device: torch.device) -> Condition:
        """The condition of networks on another device."""
        return replace(self, classes=self.classes.to(device))


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of a call's clips as rows to attend to, and the strength of guidance.

    context:        [B, L, D], on the networks' device
    negative:       the same of the negative prompts; unused where guidance is off
    guidance_scale: s of classifier-free guidance; 1 is off
    """

    context: Tensor
    negative: Tensor
    guidance_scale: float

    @property
    def batch(self) -> int:
        """B, the number of clips."""
        return len(self.context)

    def expand(self, batch: int) -> Prompts:
        """The prompts of so many clips, which share those of one."""
        rows = (rows.expand(batch, -1, -1) for rows in (self.context, self.negative))
        return Prompts(*rows, self.guidance_scale)

    def to(self, device: torch.device) -> Prompts:
        """The prompts of networks on another device."""
        rows = (rows.to(device) for rows in (self.context, self.negative))
        return Prompts(*rows, self.guidance_scale)


@dataclass(frozen=True)
class ModelSpec:
    """Everything that a model is made from, and the conditions that it is called with.

    network: (z, t, class_labels=…, lam=…, context=…, kept=…) -> ε̂; a keyword whose value is None
             here is left out
    labels:  int64 [B]; where s is not 1, [2 B]: the classes, then the null class
    scale:   s
    lam:     λ of the frames in one call of a residual network
    guidance: s of a distilled network, whose input it is; scale is then 1
    context: [B, M, C'], a prompt's embedding for each clip; where s is not 1, [2 B, M, C']: those
             of the condition, then the unconditional ones
    weights: addresses and version counters of the network's weights; set here

    Equal specs may have labels and a context of other values, but of the same shapes.
    """

    network: Callable[..., Tensor]
    labels: Tensor | None = field(default=None, compare=False)
    scale: float = 1.0
    lam: tuple[float, ...] | None = None
    context: Tensor | None = field(default=None, compare=False)
    guidance: float | None = None
    num_labels: int = field(init=False)
    context_form: tuple | None = field(init=False)  # shape and dtype
    weights: tuple = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_labels", 0 if self.labels is None else len(self.labels))
        form = None if self.context is None else (self.context.shape, self.context.dtype)
        object.__setattr__(self, "context_form", form)
        modules = (self.network,) if isinstance(self.network, nn.Module) else ()
        object.__setattr__(self, "weights", weights_key(*modules))

    def build(self, device: torch.device) -> GuidedModel:
        """A model of this spec, with buffers on the device."""
        return GuidedModel(self, device)


def guided(
    network: Callable[..., Tensor],
    condition: Condition,
    null_class: int,
    lam: tuple[float, ...] | None = None,
) -> ModelSpec:
    """The spec of a network under a condition, with guidance where it changes the estimate.

    null_class: the class that stands for no condition
    """
    classes, scale = condition.classes, condition.guidance_scale
    null = torch.full_like(classes, null_class)
    if scale == 1.0 or torch.equal(classes, null):
        return ModelSpec(network, classes, lam=lam)
    return ModelSpec(network, torch.cat([classes, null]), scale, lam)


def prompted(
    network: Callable[..., Tensor],
    context: Tensor,
    negative: Tensor,
    guidance_scale: float,
    lam: tuple[float, ...] | None = None,
) -> ModelSpec:
    """The spec of a network under prompts, with guidance unless guidance_scale is 1.

    context:  [B, M, C'], the embedding of each clip's prompt, on the network's device
    negative: the same of the negative prompts; unused where guidance is off

    Raises ValueError where their shapes differ.
    """
    if guidance_scale == 1.0:
        return ModelSpec(network, lam=lam, context=context)
    if context.shape != negative.shape:
        raise ValueError(
            f"prompted: negative must be {list(context.shape)} as context, "
            f"got {list(negative.shape)}"
        )
    both = torch.cat([context, negative])
    return ModelSpec(network, scale=guidance_scale, lam=lam, context=both)


def told(
    network: Callable[..., Tensor],
    condition: Condition | Prompts,
    lam: tuple[float, ...] | None = None,
) -> ModelSpec:
    """The spec of a distilled network, which one call a step tells the guidance scale."""
    if isinstance(condition, Prompts):
        shown = {"context": condition.context}
    else:
        shown = {"labels": condition.classes}
    return ModelSpec(network, lam=lam, guidance=condition.guidance_scale, **shown)


class GuidedModel:
    """A network as (z, t) -> ε, with the labels, λ and context of its spec."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.network, self.scale, self.guidance = spec.network, spec.scale, spec.guidance
        self.labels = None if spec.labels is None else spec.labels.clone()
        self.context = None if spec.context is None else spec.context.clone()
        self.lam = (
            None if spec.lam is None else torch.tensor(spec.lam, dtype=torch.float32, device=device)
        )

    def set_labels(self, labels: Tensor | None) -> None:
        """Replaces the labels by as many others."""
        if labels is not None:
            self.labels.copy_(labels)

    def set_context(self, context: Tensor | None) -> None:
        """Replaces the context by another of its shape."""
        if context is not None:
            self.context.copy_(context)

    def in_loop(self, steps: Steps) -> LoopModel | None:
        """The network in a loop, with guidance, if it has a form for that."""
        tie = getattr(self.network, "in_loop", None)
        if tie is None:
            return None
        return tie(steps, self.labels, self.lam, self.scale, self.context, self.guidance)

    def __call__(self, z: Tensor, t: Tensor, kept: Kept | None = None) -> Tensor:
        conditions = {
            **{"class_labels": self.labels, "lam": self.lam},
            **{"context": self.context, "guidance": self.guidance, "kept": kept},
        }
        conditions = {name: value for name, value in conditions.items() if value is not None}
        if self.scale == 1.0:
            return self.network(z, t, **conditions)
        conditional, unconditional = self.network(
            torch.cat([z, z]), torch.cat([t, t]), **conditions
        ).chunk(2)
        return torch.lerp(unconditional, conditional, self.scale)
