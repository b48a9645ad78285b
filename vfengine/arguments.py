"""Which arguments are an int or a number, for everything that Python code may call; no torch here.

An int is what stands for one without loss (`operator.index`): Python's, numpy's, a tensor of one
int. A number is also what converts by `float`. True and False are neither.
"""

import operator
from collections.abc import Sequence


def as_int(value: object) -> int | None:
    """The argument as an int; None where it is none."""
    try:
        return None if _is_bool(value) else operator.index(value)
    except TypeError:
        return None


def as_float(value: object) -> float | None:
    """The argument as a float, which may be NaN; None where it is no number."""
    if _is_bool(value) or "complex" in str(getattr(value, "dtype", "")):
        return None
    if getattr(value, "ndim", 0) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # complex ones, meta tensors
        return None


def keep_plain(
    given: object, ints: Sequence[str], floats: Sequence[str], switches: Sequence[str]
) -> None:
    """Puts Python's ints and floats into fields of a frozen dataclass, for what stands for them.

    What is none stays, for the field's own check to name; TypeError for a switch that is no bool.
    """
    for names, plain in ((ints, as_int), (floats, as_float)):
        for name in names:
            if (number := plain(getattr(given, name, None))) is not None:
                object.__setattr__(given, name, number)
    for name in switches:
        if not _is_bool(value := getattr(given, name, False)):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
