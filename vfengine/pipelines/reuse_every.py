"""`reuse_every`: every how many steps the whole network of a phase runs, in the forms of a request.

An int stands for all phases; {"base": 2, "residual": 3} or the text "base=2,residual=3" names some,
and the others reuse nothing. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..arguments import as_int

ReuseEvery = int | str | Mapping[str, int]


def each_phase(value: ReuseEvery, phases: Sequence[str]) -> dict[str, int]:
    """The number of each phase; ValueError for what has none of the forms or names another."""
    given = value
    if isinstance(value, str):
        entries = [entry.split("=") for entry in value.split(",")]
        number = _whole(value)
        pairs = all(len(entry) == 2 for entry in entries)
        given = {name.strip(): _whole(text) for name, text in entries} if pairs else number
        if pairs and len(given) < len(entries):  # a phase is there twice
            given = None
    if not isinstance(given, Mapping):
        given = dict.fromkeys(phases, given)
    numbers = {name: as_int(number) for name, number in given.items()}
    if not given or not given.keys() <= set(phases) or any((n or 0) < 1 for n in numbers.values()):
        form = ",".join(f"{name}=2" for name in phases)
        raise ValueError(
            f"reuse_every must be an int of at least 1, or one for each phase as in {form!r}, "
            f"got {value!r}"
        )
    return {name: numbers.get(name, 1) for name in phases}


def plain_reuse_every(value: ReuseEvery, phases: Sequence[str]) -> int | str:
    """The same in one form: an int where all phases have the same, else a text with them all."""
    numbers = each_phase(value, phases)
    if len(set(numbers.values())) == 1:
        return numbers[phases[0]]
    return ",".join(f"{name}={number}" for name, number in numbers.items())


def _whole(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None
