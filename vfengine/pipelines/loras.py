"""LoRA in a pipeline: read and checked against its networks, before anything is sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..formats.lora import Lora, Target, Update, Updates, read_lora, updates_of
from ..formats.lora_files import lora_files

_RECORDED_AS = {"text": "text_encoder"}  # networks whose files have another name


@dataclass(frozen=True)
class Loras:
    """What a pipeline adds to its weights.

    loras:   in their order, each with the networks that it changes
    updates: of the networks "base", "residual", "video" and "text", by our names of weights
    """

    loras: tuple[tuple[Lora, tuple[str, ...]], ...] = ()
    updates: Mapping[str, Updates] = field(default_factory=dict)

    def digests(self, sha256: Mapping[str, str]) -> dict[str, str]:
        """SHA-256 of a model's files, changed for those networks that are."""
        found = dict(sha256)
        for network in self.updates:
            name = _RECORDED_AS.get(network, network)
            if name in found:
                added = [
                    f"{lora.record['sha256']} {lora.file.scale!r}"
                    for lora, changed in self.loras
                    if network in changed
                ]
                found[name] = hashlib.sha256("\n".join([found[name], *added]).encode()).hexdigest()
        return found

    def names(self) -> list[str]:
        """Each LoRA as a clip's record has it: "name of the file:scale"."""
        return [f"{lora.record['name']}:{lora.file.scale!r}" for lora, _ in self.loras]

    def records(self) -> list[dict[str, str]]:
        """Name and SHA-256 of each."""
        return [dict(lora.record) for lora, _ in self.loras]


def open_loras(given: Any, targets: Mapping[str, Target]) -> Loras:
    """The LoRA of an argument `lora`: a path, (path, scale), or a list of these.

    targets: the networks that they may change

    Raises TypeError or ValueError for another argument, FileNotFoundError for a missing file,
    ValueError, naming it, for one that is damaged or does not fit the networks.
    """
    loras: list[tuple[Lora, tuple[str, ...]]] = []
    updates: dict[str, dict[str, list[Update]]] = {}
    for file in lora_files(given):
        lora = read_lora(file)
        changed = updates_of(lora, targets)
        loras.append((lora, tuple(changed)))
        for network, weights in changed.items():
            for weight, update in weights.items():
                updates.setdefault(network, {}).setdefault(weight, []).append(update)
    return Loras(tuple(loras), updates)
