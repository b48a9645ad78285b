"""What a UNet is: its shape, level by level, and which variants of its layers it has."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

# what UNetConfig accepts: the least of its counts, and of its sequences' entries (None: booleans)
_LARGEST = 2**16
_COUNTS = {
    "in_channels": 1,
    "out_channels": 1,
    "patch_size": 1,
    "temporal_conv_depth": 1,
    "num_classes": 1,
    "context_dim": 1,
    "position_buckets": 0,
    "head_dim": 1,
    "norm_groups": 1,
    "feed_forward_mult": 0,
    "mid_blocks": 0,
    "temporal_self_attentions": 1,
    "class_features": 1,
    "transformer_in_heads": 1,
}
_PER_LEVEL = {
    "block_out_channels": 2,
    "layers_per_block": 0,
    "spatial_attention": None,
    "temporal_attention": None,
    "temporal_conv": None,
    "head_dims": 1,
    "transformer_depths": 1,
}
_SWITCHES = (
    *("frame_embedding", "scale_shift", "temporal_feed_forward", "norm_over_frames"),
    *("sin_first", "any_size", "needs_context"),
)
_OPTIONAL = (
    *("num_classes", "context_dim", "class_features", "transformer_in_heads"),
    *("head_dims", "transformer_depths"),
)
_CLASS_EMBEDDINGS = ("null", "table", "timestep", "projection")


def _later(default: Any) -> Any:
    """A field that the configuration has gained: at its default it is neither shown nor written.

    Files, states of training and base caches name a model by what they show of it: older ones stay
    good.
    """
    return field(default=default, repr=False)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet. A level is one resolution; sequences hold one entry per level, finest first.

    patch_size        p folds p x p pixels into channels before the first convolution, and back
                      after the last
    spatial_attention, temporal_attention, temporal_conv    which levels have them (the middle: as
                      the last level)
    temporal_conv_depth    convolutions per temporal convolution block
    frame_embedding   adds an embedding of the frame's distance to the base frame N // 2
    num_classes       class labels 0 .. num_classes - 1, and the null class num_classes; None: no
                      classes
    context_dim       width of the context sequence that spatial transformers attend to; None: no
                      context
    position_buckets  of the relative position bias of temporal attention; 0: none
    feed_forward_mult, scale_shift, head_dim, norm_groups    see `layers`
    temporal_feed_forward    whether temporal transformers have the feed-forward layer too

    Of networks that others have trained (`load_unet`):
    head_dims, transformer_depths    per level, in place of head_dim and of one block a transformer
    transformer_in_heads    a temporal transformer after the first convolution, with these many
                      heads of head_dim, which may be wider than its channels; None: there is none
    mid_blocks        residual blocks in the middle; attention follows the first
    mid_spatial_attention, mid_temporal_attention    None: as the last level
    temporal_self_attentions    per temporal transformer block, 1 or 2
    norm_over_frames  whether temporal transformers normalise over all frames of a clip at once
    norm_eps, transformer_norm_eps    of the GroupNorms of residual blocks and the output, and of
                      transformers
    sin_first, frequency_shift    of the timestep's embedding, see `sinusoidal_embedding`
    class_embedding   "null": num_classes and the null class, which is meant where there are no
                      labels. Labels are needed by the others: "table" of num_classes;
                      "timestep", embedded as t is; "projection" of class_features numbers
    needs_context     whether a call without a context is refused
    any_size          whether height and width may be no multiples of 2^(levels - 1)
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: Sequence[int] = (64, 128, 256)
    layers_per_block: Sequence[int] = (1, 1, 1)
    patch_size: int = 1
    spatial_attention: Sequence[bool] = (False, False, True)
    temporal_attention: Sequence[bool] = (False, False, False)
    temporal_conv: Sequence[bool] = (False, False, False)
    temporal_conv_depth: int = 1
    frame_embedding: bool = False
    num_classes: int | None = None
    context_dim: int | None = None
    position_buckets: int = 32
    head_dim: int = 32
    norm_groups: int = 8
    feed_forward_mult: int = 2
    scale_shift: bool = True
    temporal_feed_forward: bool = _later(True)
    head_dims: Sequence[int] | None = _later(None)
    transformer_depths: Sequence[int] | None = _later(None)
    transformer_in_heads: int | None = _later(None)
    mid_blocks: int = _later(2)
    mid_spatial_attention: bool | None = _later(None)
    mid_temporal_attention: bool | None = _later(None)
    temporal_self_attentions: int = _later(1)
    norm_over_frames: bool = _later(False)
    norm_eps: float = _later(1e-5)
    transformer_norm_eps: float = _later(1e-5)
    sin_first: bool = _later(False)
    frequency_shift: float | None = _later(None)
    class_embedding: str = _later("null")
    class_features: int | None = _later(None)
    needs_context: bool = _later(False)
    any_size: bool = _later(False)

    def __post_init__(self):
        for name, lowest in _COUNTS.items():
            value = getattr(self, name)
            optional = value is None and name in _OPTIONAL
            if not optional and not (_is_int(value) and lowest <= value <= _LARGEST):
                raise ValueError(
                    f"UNetConfig: {name} must be an int from {lowest} to {_LARGEST}, got {value!r}"
                )
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"UNetConfig: {name} must be true or false")
        self._check_variants()
        if self.position_buckets and self.position_buckets < 4:
            raise ValueError("UNetConfig: position_buckets must be 0, or 4 and more")
        levels = None
        for name, lowest in _PER_LEVEL.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, (tuple, list)) or not 1 <= len(value) <= 16:
                raise ValueError(f"UNetConfig: {name} must be a sequence, got {value!r}")
            levels = levels or len(value)
            if len(value) != levels:
                raise ValueError(
                    f"UNetConfig: {name} needs {levels} entries, one per level, got {value}"
                )
            for entry in value:
                if lowest is None:
                    fits = isinstance(entry, bool)
                else:
                    fits = _is_int(entry) and lowest <= entry <= _LARGEST
                if not fits:
                    raise ValueError(f"UNetConfig: {name} cannot hold {entry!r}")
            object.__setattr__(self, name, tuple(value))
        for channels, head_dim in zip(self.block_out_channels, self.level_head_dims, strict=True):
            if channels % self.norm_groups or channels % head_dim:
                raise ValueError(
                    f"UNetConfig: {channels} channels are no multiple of "
                    f"norm_groups={self.norm_groups} and head_dim={head_dim}"
                )

    def _check_variants(self) -> None:
        """ValueError for a variant that there is not."""
        for name in ("norm_eps", "transformer_norm_eps", "frequency_shift"):
            value = getattr(self, name)
            if value is None and name == "frequency_shift":
                continue
            if not (_is_int(value) or isinstance(value, float)) or not 0 <= value <= 1:
                raise ValueError(f"UNetConfig: {name} must be a number in [0, 1], got {value!r}")
        for name in ("mid_spatial_attention", "mid_temporal_attention"):
            if getattr(self, name) not in (None, True, False):
                raise ValueError(f"UNetConfig: {name} must be true, false or null")
        if self.temporal_self_attentions > 2:
            raise ValueError("UNetConfig: temporal_self_attentions must be 1 or 2")
        kind = self.class_embedding
        if kind not in _CLASS_EMBEDDINGS:
            raise ValueError(f"UNetConfig: class_embedding must be one of {_CLASS_EMBEDDINGS}")
        if kind == "table" and self.num_classes is None:
            raise ValueError("UNetConfig: a table of classes needs num_classes")
        if (kind == "projection") != (self.class_features is not None):
            raise ValueError("UNetConfig: class_features go with class_embedding='projection'")

    def to_dict(self) -> dict[str, Any]:
        """All entries but the later ones (`_later`) that are at their default."""
        values = asdict(self)
        for f in fields(self):
            if not f.repr and values[f.name] == f.default:
                del values[f.name]
        return values

    def identity(self) -> dict[str, Any]:
        """The entries that hashes name a model by: they had temporal_feed_forward from the start"""
        return {**self.to_dict(), "temporal_feed_forward": self.temporal_feed_forward}

    @property
    def level_head_dims(self) -> tuple[int, ...]:
        """Channels of an attention head, per level."""
        return self.head_dims or (self.head_dim,) * len(self.block_out_channels)

    @property
    def is_video(self) -> bool:
        """Whether the UNet takes clips [B, N, C, H, W]; otherwise images [B, C, H, W]."""
        temporal = (*self.temporal_attention, *self.temporal_conv, self.mid_temporal_attention)
        return self.frame_embedding or self.transformer_in_heads is not None or any(temporal)

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this."""
        return self.patch_size * (1 if self.any_size else 2 ** (len(self.block_out_channels) - 1))


def vdm_config(base: UNetConfig, channels: Sequence[int] | None = None) -> UNetConfig:
    """VDM*: an image UNet made a plain video model (Ho et al. 2022, arXiv 2204.03458).

    After every spatial attention comes a temporal one with a relative position bias, and nothing
    else: the image UNet's weights are a part of its weights, and a temporal layer starts at zero.

    channels: per level, in place of the base's

    Raises ValueError for a base that is a video UNet already, or that has no spatial attention.
    """
    if base.is_video or not any(base.spatial_attention):
        raise ValueError(
            "vdm_config: needs an image UNet with spatial attention, got "
            + ("a video UNet" if base.is_video else "one without")
        )
    return replace(
        base,
        block_out_channels=base.block_out_channels if channels is None else channels,
        temporal_attention=base.spatial_attention,
        mid_temporal_attention=base.mid_spatial_attention,
        temporal_feed_forward=False,
        position_buckets=max(base.position_buckets, UNetConfig.position_buckets),
    )
