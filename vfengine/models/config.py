"""The configuration of a UNet: its shape, level by level, and the variants of its layers."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

_LARGEST = 2**16
_MOST_LAYERS = 2**10  # of a UNet: building more would take minutes, and files hold none
_CLASS_EMBEDDINGS = ("null", "table", "timestep", "projection")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# -- fields: a default, and a rule (name, value) that raises ValueError for other values -----------


def _field(default: Any, rule: Callable[[str, Any], None], later: bool, per_level=False) -> Any:
    """A field and its rule.

    later: the field was added after the first release. At its default it appears neither in repr
           nor in files, so that hashes in older checkpoints, training states and caches still hold
    """
    return field(default=default, repr=not later, metadata={"rule": rule, "per_level": per_level})


def _count(default: int | None, least: int = 1, later: bool = False) -> Any:
    """An int of at least `least`; also None where that is the default."""

    def rule(name: str, value: Any) -> None:
        if not (value is None and default is None):
            if not (_is_int(value) and least <= value <= _LARGEST):
                raise ValueError(
                    f"UNetConfig: {name} must be an int from {least} to {_LARGEST}, got {value!r}"
                )

    return _field(default, rule, later)


def _switch(default: bool, later: bool = False) -> Any:
    def rule(name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"UNetConfig: {name} must be true or false")

    return _field(default, rule, later)


def _choice_or_none(later: bool) -> Any:
    def rule(name: str, value: Any) -> None:
        if value not in (None, True, False):
            raise ValueError(f"UNetConfig: {name} must be true, false or null")

    return _field(None, rule, later)


def _number(default: float | None, later: bool = False) -> Any:
    """A number in [0, 1]; also None where that is the default."""

    def rule(name: str, value: Any) -> None:
        if not (value is None and default is None):
            if not (_is_int(value) or isinstance(value, float)) or not 0 <= value <= 1:
                raise ValueError(f"UNetConfig: {name} must be a number in [0, 1], got {value!r}")

    return _field(default, rule, later)


def _one_of(default: str, choices: Sequence[str], later: bool = False) -> Any:
    def rule(name: str, value: Any) -> None:
        if value not in choices:
            raise ValueError(f"UNetConfig: {name} must be one of {choices}")

    return _field(default, rule, later)


def _per_level(default: Sequence | None, later: bool, fits: Callable[[Any], bool]) -> Any:
    """A sequence of one entry per level, all of which fit; also None where that is the default."""

    def rule(name: str, value: Any) -> None:
        for entry in value:
            if not fits(entry):
                raise ValueError(f"UNetConfig: {name} cannot hold {entry!r}")

    return _field(default, rule, later, per_level=True)


def _counts(default: Sequence[int] | None, least: int = 1, later: bool = False) -> Any:
    return _per_level(default, later, lambda entry: _is_int(entry) and least <= entry <= _LARGEST)


def _switches(default: Sequence[bool]) -> Any:
    return _per_level(default, False, lambda entry: isinstance(entry, bool))


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet. A level is one resolution; sequences hold one entry per level, finest first.

    patch_size        p folds p x p pixels into channels before the first convolution, and back
                      after the last
    spatial_attention, temporal_attention, temporal_conv    which levels have them; the middle has
                      what the last level has
    temporal_conv_depth    convolutions per temporal convolution block
    frame_embedding   adds an embedding of the frame's distance to the base frame N // 2
    num_classes       class labels 0 .. num_classes - 1, and the null class num_classes; None: no
                      classes
    context_dim       width of the context sequence that spatial transformers attend to; None: no
                      context
    position_buckets  of the relative position bias of temporal attention; 0: none
    feed_forward_mult, scale_shift, head_dim, norm_groups    see `layers`
    temporal_feed_forward    whether temporal transformers have the feed-forward layer too

    For published networks (`load_unet`):
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
    class_embedding   "null": a table of num_classes and the null class, which a call without labels
                      uses. The others need labels: "table" of num_classes; "timestep", embedded
                      as t is; "projection" of class_features numbers
    needs_context     whether a call without a context is refused
    any_size          whether height and width need not be multiples of 2^(levels - 1)
    pixel_attention   whether an attention of the pixels alone stands in place of each spatial
                      transformer
    padded_after      whether downsampling pads below and to the right alone

    For distilled networks:
    guidance_embedding    adds an embedding of the guidance scale, which a call must then give
    """

    in_channels: int = _count(3)
    out_channels: int = _count(3)
    block_out_channels: Sequence[int] = _counts((64, 128, 256), least=2)
    layers_per_block: Sequence[int] = _counts((1, 1, 1), least=0)
    patch_size: int = _count(1)
    spatial_attention: Sequence[bool] = _switches((False, False, True))
    temporal_attention: Sequence[bool] = _switches((False, False, False))
    temporal_conv: Sequence[bool] = _switches((False, False, False))
    temporal_conv_depth: int = _count(1)
    frame_embedding: bool = _switch(False)
    num_classes: int | None = _count(None)
    context_dim: int | None = _count(None)
    position_buckets: int = _count(32, least=0)
    head_dim: int = _count(32)
    norm_groups: int = _count(8)
    feed_forward_mult: int = _count(2, least=0)
    scale_shift: bool = _switch(True)
    temporal_feed_forward: bool = _switch(True, later=True)
    head_dims: Sequence[int] | None = _counts(None, later=True)
    transformer_depths: Sequence[int] | None = _counts(None, later=True)
    transformer_in_heads: int | None = _count(None, later=True)
    mid_blocks: int = _count(2, least=0, later=True)
    mid_spatial_attention: bool | None = _choice_or_none(later=True)
    mid_temporal_attention: bool | None = _choice_or_none(later=True)
    temporal_self_attentions: int = _count(1, later=True)
    norm_over_frames: bool = _switch(False, later=True)
    norm_eps: float = _number(1e-5, later=True)
    transformer_norm_eps: float = _number(1e-5, later=True)
    sin_first: bool = _switch(False, later=True)
    frequency_shift: float | None = _number(None, later=True)
    class_embedding: str = _one_of("null", _CLASS_EMBEDDINGS, later=True)
    class_features: int | None = _count(None, later=True)
    needs_context: bool = _switch(False, later=True)
    any_size: bool = _switch(False, later=True)
    pixel_attention: bool = _switch(False, later=True)
    padded_after: bool = _switch(False, later=True)
    guidance_embedding: bool = _switch(False, later=True)

    def __post_init__(self):
        levels = None
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata["per_level"]:
                if value is None and f.default is None:
                    continue
                if not isinstance(value, (tuple, list)) or not 1 <= len(value) <= 16:
                    raise ValueError(f"UNetConfig: {f.name} must be a sequence, got {value!r}")
                levels = levels or len(value)
                if len(value) != levels:
                    raise ValueError(
                        f"UNetConfig: {f.name} needs {levels} entries, one per level, got {value}"
                    )
            f.metadata["rule"](f.name, value)
            if f.metadata["per_level"]:
                object.__setattr__(self, f.name, tuple(value))
        self._check_combinations()

    def _check_combinations(self) -> None:
        """ValueError for entries that do not go together."""
        if self.temporal_self_attentions > 2:
            raise ValueError("UNetConfig: temporal_self_attentions must be 1 or 2")
        if self.class_embedding == "table" and self.num_classes is None:
            raise ValueError("UNetConfig: a table of classes needs num_classes")
        if (self.class_embedding == "projection") != (self.class_features is not None):
            raise ValueError("UNetConfig: class_features go with class_embedding='projection'")
        if self.pixel_attention and (self.context_dim or self.transformer_depths):
            raise ValueError("UNetConfig: pixel_attention has neither a context nor a depth")
        if self.padded_after and self.any_size:
            raise ValueError("UNetConfig: padded_after needs even sizes, which any_size gives up")
        if self.position_buckets and self.position_buckets < 4:
            raise ValueError("UNetConfig: position_buckets must be 0, or 4 and more")
        finest = self.block_out_channels[0]  # as wide as the embedding of the timestep
        if finest % 2 or finest / 2 == self.frequency_shift:
            raise ValueError(
                f"UNetConfig: the finest level must have an even number of channels, and not twice "
                f"frequency_shift={self.frequency_shift}: no timestep has {finest} numbers"
            )
        depths = self.transformer_depths or (1,) * len(self.layers_per_block)
        layers = self.mid_blocks + sum(
            count * (depth + self.temporal_conv_depth)
            for count, depth in zip(self.layers_per_block, depths, strict=True)
        )
        if layers > _MOST_LAYERS:
            raise ValueError(
                f"UNetConfig: layers_per_block={self.layers_per_block}, transformer_depths="
                f"{depths}, temporal_conv_depth={self.temporal_conv_depth} and mid_blocks="
                f"{self.mid_blocks} make {layers} layers, {_MOST_LAYERS} at most"
            )
        for channels, head_dim in zip(self.block_out_channels, self.level_head_dims, strict=True):
            if channels % self.norm_groups or channels % head_dim:
                raise ValueError(
                    f"UNetConfig: {channels} channels are no multiple of "
                    f"norm_groups={self.norm_groups} and head_dim={head_dim}"
                )

    def to_dict(self) -> dict[str, Any]:
        """All entries except later ones (`_field`) at their default."""
        values = asdict(self)
        for f in fields(self):
            if not f.repr and values[f.name] == f.default:
                del values[f.name]
        return values

    def identity(self) -> dict[str, Any]:
        """The entries that hashes are made of: `to_dict`, and always temporal_feed_forward."""
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
    """VDM*: a plain video model made of an image UNet (Ho et al. 2022, arXiv 2204.03458).

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
