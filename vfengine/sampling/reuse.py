"""Loops that are used again: with their buffers, and on CUDA their graph, from call to call.

A loop is kept until a call needs another: for other shapes, scales, solvers or weights, not for
other noise or labels. One loop a phase, so memory does not grow from call to call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .cuda_graph import surroundings_key
from .guidance import GuidedModel, ModelSpec
from .loop import Loop
from .two_phase import BaseSpec, ResidualSpec


@dataclass(frozen=True, eq=False)
class KeptLoop:
    """A loop between runs, its model, and all that the two were made from."""

    made_from: tuple
    loop: Loop
    model: GuidedModel


class KeptLoops:
    """The last loop of each phase, by name."""

    def __init__(self) -> None:
        self.kept: dict[str, KeptLoop] = {}

    @contextmanager
    def borrow(self, spec: BaseSpec | ResidualSpec, model: ModelSpec) -> Iterator[Any]:
        """The phase's loop for one run: the last one if it was made from the same, or a new one.

        Meanwhile it is out of reach, so that a call inside a callback or in another thread makes
        its own; after an error it is not used again.
        """
        made_from = (spec, model, surroundings_key(spec.device))
        kept = self.kept.pop(spec.phase, None)
        if kept is None or kept.made_from != made_from:
            kept = None  # its buffers go before the new ones come
            guided = model.build(spec.device)
            with torch.inference_mode():
                kept = KeptLoop(made_from, spec.build(guided), guided)
        kept.model.set_labels(model.labels)
        yield kept.loop
        self.kept[spec.phase] = kept

    def release(self, phase: str) -> None:
        """Lets the phase's loop go, and with it its network."""
        self.kept.pop(phase, None)
