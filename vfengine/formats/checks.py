"""Checks of values that configurations hold; each raises a ValueError that names the value."""

from __future__ import annotations

from collections.abc import Callable


def check_number(name: str, value: object, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not fits(value):
        raise ValueError(f"{name} is out of range: {value!r}")


def object_of(name: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {value!r}")
    return value


def positive(value: float) -> bool:
    """Whether a number is above 0, and float32 holds its square and the inverse of that."""
    return 1e-15 <= value <= 1e15
