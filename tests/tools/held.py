"""What a pipeline keeps in memory between calls: the tests' one access to its private parts."""

from torch import nn

from vfengine.pipelines.pipeline import Pipeline
from vfengine.sampling.loop import Loop


def networks_of(pipe: Pipeline) -> dict[str, nn.Module]:
    """The networks in memory, by name."""
    return pipe._session.networks


def loops_of(pipe: Pipeline) -> dict[str, Loop]:
    """The loops that the next call may use again, by phase."""
    return {phase: kept.loop for phase, kept in pipe._session.loops.kept.items()}
