"""The arguments of compiled kernels: one struct an op, its fields by name (csrc/<op>.h)."""

import pytest

from vfengine.native import vfengine_native as native
from vfengine.ops import _dispatch, _frame_ops
from vfengine.ops.decomposed_noise import STEP_BITS

CLASSES = sorted(name for name in dir(native) if hasattr(getattr(native, name), "fields"))
VALUES = {  # a value of each kind, and one of another
    "an address": (64, -1),
    "an int": (2**62, 2**63),
    "an int in [0, 2^32)": (2**31, 2**32),
    "a seed in [0, 2^64)": (2**63, 2**64),
    "a number": (0.5, "0.5"),
    "a bool": (True, 1),
    "the number of a dtype": (3, 4),
    "the number of an epilogue": (3, 4),
}


def values_of(kind: str) -> tuple:
    if kind in VALUES:
        return VALUES[kind]
    many, _, part = kind.rpartition("of ")  # "of Linear", "1 to 3 of RowSource"
    return ((whole(part),), ()) if many else (whole(part), None)


def whole(name: str) -> object:
    """The struct with all its fields."""
    kind = getattr(native, name)
    return kind(**{field: values_of(of)[0] for field, of in kind.fields.items()})


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_is_taken_by_name_and_named_where_it_is_wrong(name):
    kind = getattr(native, name)
    given = {field: values_of(of)[0] for field, of in kind.fields.items()}
    for field, of in kind.fields.items():
        others = {key: value for key, value in given.items() if key != field}
        if field in kind.optional:
            kind(**others)
        else:
            with pytest.raises(TypeError, match=f"^{name}: {field} is missing$"):
                kind(**others)
        wrong = values_of(of)[1]
        with pytest.raises(TypeError) as error:
            kind(**{**given, field: wrong})
        got = f"got {type(wrong).__name__} {wrong!r}"
        assert str(error.value) == f"{name}: {field} must be {of}, {got}"
    with pytest.raises(TypeError, match=f"^{name}: rowz is no field of it$"):
        kind(**given, rowz=1)
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        kind(0)


def test_a_kernel_takes_its_own_struct_alone():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.layer_norm_cpu(whole("GegluArgs"), 1)


def test_python_has_the_names_and_constants_of_csrc():
    assert set(_frame_ops._TYPES) <= set(native.FrameArgs.fields)
    assert native.MAX_HEAD_DIM >= _dispatch.MAX_HEAD_DIM  # a CPU takes more than a GPU
    assert native.STEP_BITS == STEP_BITS
