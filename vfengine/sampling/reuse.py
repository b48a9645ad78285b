"""Loops kept between calls, with their buffers and, on CUDA, their graphs.

A loop is kept until a call needs a different one: for another shape, guidance scale, solver or
weights, but not for other noise, labels or prompts. One loop is kept per phase: memory does not
grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .cuda_graph import process_settings_key
from .guidance import GuidedModel, ModelSpec
from .loop import Loop
from .two_phase import BaseSpec, ResidualSpec


@dataclass(frozen=True, eq=False)
class KeptLoop:
    """A loop between runs, its model, and a key of all that the two were made from."""

    key: tuple
    loop: Loop
    model: GuidedModel


class KeptLoops:
    """The last loop of each phase, by name."""

    def __init__(self) -> None:
        self.kept: dict[str, KeptLoop] = {}

    def __reduce__(self) -> tuple:
        """A copy or a pickle begins with none: loops hold addresses and graphs."""
        return KeptLoops, ()

    @contextmanager
    def borrow(self, spec: BaseSpec | ResidualSpec, model: ModelSpec) -> Iterator[Any]:
        """The phase's loop for one run: the kept one if it was made from the same, or a new one.

        No other call can borrow it meanwhile: a call inside a callback or in another thread makes
        its own loop. After an error the loop is not kept.
        """
        key = (spec, model, process_settings_key(spec.device))
        kept = self.kept.pop(spec.phase, None)
        if kept is None or kept.key != key:
            kept = None  # frees its buffers before the new ones are allocated
            guided = model.build(spec.device)
            with torch.inference_mode():
                kept = KeptLoop(key, spec.build(guided), guided)
        kept.model.set_labels(model.labels)
        kept.model.set_context(model.context)
        yield kept.loop
        self.kept[spec.phase] = kept

    def release(self, phase: str) -> None:
        """Drops the phase's loop, which holds its network."""
        self.kept.pop(phase, None)
