"""CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020): token ids to rows of numbers.

ids [B, L] -> token and position embeddings -> blocks of self-attention and an MLP, each behind a
LayerNorm and added to its input -> a last LayerNorm -> [B, L, D]. Nothing is pooled: a UNet attends
to all rows.

CLIP's attention is causal. Our own text encoder's is not, and its embeddings are narrower than D:
a projection follows them (ALBERT, Lan et al. 2019, arXiv 1909.11942).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .empty import without_weights
from .layers import Attention

ACTIVATIONS = ("gelu", "quick_gelu")
MAX_LENGTH = 128  # tokens, of the kernel that attends to them
_LARGEST, _MOST_LAYERS = 2**20, 2**10  # of any number, and of layers: files hold no more
_EXPECTED = {str: "a name", bool: "True or False"}
_EXPECTED |= {kind: f"a positive {kind.__name__} below {_LARGEST}" for kind in (int, float)}


@dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of a text encoder.

    max_length       L, the tokens of a text
    width            D
    activation       of the MLPs: "gelu" is x Φ(x), "quick_gelu" x / (1 + e^(-1.702 x))
    causal           whether a token attends to none after it
    embedding_width  of token and position embeddings, which are then projected to D; None: they
                     have D numbers themselves

    Raises ValueError, naming it, for a field of another type or range.
    """

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 1024
    num_layers: int = 23
    num_heads: int = 16
    mlp_width: int = 4096
    activation: str = "gelu"
    norm_eps: float = 1e-5
    causal: bool = True
    embedding_width: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            kind = int if field.default is None else type(field.default)
            if type(value) is not kind or (kind in (int, float) and not 0 < value < _LARGEST):
                raise ValueError(
                    f"TextEncoderConfig: {field.name} must be {_EXPECTED[kind]}, got {value!r}"
                )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"TextEncoderConfig: activation must be one of {ACTIVATIONS}, "
                f"got {self.activation!r}"
            )
        if self.num_layers > _MOST_LAYERS:
            raise ValueError(
                f"TextEncoderConfig: num_layers may be {_MOST_LAYERS} at most, got "
                f"{self.num_layers}"
            )
        if self.max_length > MAX_LENGTH:
            raise ValueError(
                f"TextEncoderConfig: max_length may be {MAX_LENGTH} at most, got {self.max_length}"
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"TextEncoderConfig: width {self.width} is no multiple of num_heads "
                f"{self.num_heads}"
            )


class CausalMask(nn.Module):
    """A bias of attention, under which a token attends to none after it; see `TransformerBlock`."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def forward(self, length: int, device: torch.device) -> Tensor:
        """fp32 [heads, L, L]: 0 up to the token itself, then -inf."""
        mask = torch.full((length, length), -torch.inf, device=device, dtype=torch.float32).triu(1)
        return mask.expand(self.heads, -1, -1)


class TextBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, width // config.num_heads, bias=True)
        self.mask = CausalMask(config.num_heads) if config.causal else None
        self.norm2 = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, width)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> the same shape."""
        mask = None if self.mask is None else self.mask(x.shape[1], x.device).to(x.dtype)
        x = x + self.attention(self.norm1(x), bias=mask)
        h = self.fc1(self.norm2(x))
        h = F.gelu(h) if self.activation == "gelu" else h * torch.sigmoid(1.702 * h)
        return x + self.fc2(h)

    def plan(self, build, x):
        """Tokens take the place of frames, whose attention may have a bias, here the mask."""
        x = build.attention(x, self.norm1, self.attention, bias=self.mask, over_frames=True)
        h = build.activated(build.layer_norm(x, self.norm2), self.fc1, self.activation)
        return build.linear(h, self.fc2, residual=x)


class TextEmbeddings(nn.Module):
    """ids int64 [B, L] -> [B, L, width], a token's row plus its position's."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.width = config.embedding_width or config.width
        self.token_embedding = nn.Embedding(config.vocab_size, self.width)
        self.position_embedding = nn.Embedding(config.max_length, self.width)

    def forward(self, ids: Tensor) -> Tensor:
        """Raises TypeError for ids of another dtype, ValueError for a shape or an unknown token."""
        config = self.config
        if ids.dtype != torch.int64:
            raise TypeError(f"TextEncoder: ids must be int64, got {ids.dtype}")
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= config.max_length or not len(ids):
            raise ValueError(
                f"TextEncoder: ids must be [B, 1 … {config.max_length}], got {list(ids.shape)}"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
            raise ValueError(
                f"TextEncoder: ids must lie in 0 … {config.vocab_size - 1}, got "
                f"{int(ids.min())} … {int(ids.max())}"
            )
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextEncoder(nn.Module):
    """forward(ids int64 [B, L]) -> [B, L, D] in the dtype of the weights."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.projection = None
        if config.embedding_width is not None:
            self.projection = nn.Linear(config.embedding_width, config.width)
        self.layers = nn.ModuleList(TextBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        if self.projection is not None:
            x = self.projection(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def plan(self, build, x):
        if self.projection is not None:
            x = build.linear(x, self.projection)
        for layer in self.layers:
            x = layer.plan(build, x)
        return build.layer_norm(x, self.norm)


def empty_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """A text encoder on the meta device; `load_state_dict(…, assign=True)` gives it its weights."""
    with without_weights():
        return TextEncoder(config)
