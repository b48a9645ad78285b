"""The order of a UNet's layers: one list, by which a UNet is built, run, planned and mapped."""

from collections.abc import Iterator
from dataclasses import dataclass

from .config import UNetConfig

SHALLOW = 1  # last stages of the way up, which run on every step where features are reused


@dataclass(frozen=True)
class Step:
    """One layer between the first convolution of a UNet and the norm of its output.

    name:        of the layer, as in state dicts: part, index, and in down and up the number
    kind:        "stage", "downsample" or "upsample"
    level:       the layer's output has this level's channels
    in_channels: of its input, with a concatenated skip
    attends:     whether a stage has a spatial and a temporal transformer
    """

    name: str
    kind: str
    level: int
    in_channels: int
    attends: tuple[bool, bool] = (False, False)

    @property
    def part(self) -> str:
        return self.name.partition(".")[0]

    @property
    def leaves_skip(self) -> bool:
        """Whether its result is a skip for the way up."""
        return self.part in ("down", "downsamplers")

    @property
    def joins_skip(self) -> bool:
        """Whether the last skip is concatenated to its input."""
        return self.part == "up"


def topology(config: UNetConfig) -> Iterator[Step]:
    """The steps of a UNet in the order in which they run; the first skip is their input itself."""
    widths, depths = config.block_out_channels, config.layers_per_block
    last = len(widths) - 1
    attends = list(zip(config.spatial_attention, config.temporal_attention, strict=True))
    channels, skips = widths[0], [widths[0]]
    for level, width in enumerate(widths):
        for number in range(depths[level]):
            yield Step(f"down.{level}.{number}", "stage", level, channels, attends[level])
            channels = width
            skips.append(channels)
        if level < last:
            yield Step(f"downsamplers.{level}", "downsample", level, channels)
            skips.append(channels)
    middle = (config.mid_spatial_attention, config.mid_temporal_attention)
    for number in range(config.mid_blocks):
        attention = [
            side if chosen is None else chosen
            for chosen, side in zip(middle, attends[last], strict=True)
        ]
        first = number == 0
        yield Step(
            f"mid.{number}",
            "stage",
            last,
            channels,
            (first and attention[0], first and attention[1]),
        )
        channels = widths[last]
    for index, level in enumerate(reversed(range(last + 1))):
        for number in range(depths[level] + 1):
            joined = channels + skips.pop()
            yield Step(f"up.{index}.{number}", "stage", level, joined, attends[level])
            channels = widths[level]
        if level:
            yield Step(f"upsamplers.{index}", "upsample", level, channels)


def shallow_stages(config: UNetConfig) -> int:
    """The last steps of the way up that are the shallow part of a UNet, all of its finest level.

    One fewer of the first steps of the way down makes their skips; conv_in makes the first.
    """
    return min(SHALLOW, config.layers_per_block[0] + 1)
