"""What a pipeline holds between calls, of which it says nothing: the one look inside it."""

from torch import nn

from vfengine.pipelines.pipeline import Pipeline
from vfengine.sampling.loop import Loop


def networks_of(pipe: Pipeline) -> dict[str, nn.Module]:
    """Those in memory, by name."""
    return pipe._session.networks


def loops_of(pipe: Pipeline) -> dict[str, Loop]:
    """Those that the next call may use again, by phase."""
    return {phase: kept.loop for phase, kept in pipe._session.loops.kept.items()}
