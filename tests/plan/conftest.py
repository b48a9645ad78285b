"""Shared fixtures of planned networks."""

import pytest

from vfengine.native import vfengine_native


@pytest.fixture
def isas():
    """Sets an instruction set until the test ends."""
    former = vfengine_native.cpu_isa()
    yield vfengine_native.set_cpu_isa
    vfengine_native.set_cpu_isa(former)
