"""Text encoders whose tokens see all others, and whose embeddings are projected to their width."""

from dataclasses import replace

import pytest
import torch
from seeded import filled
from torch import nn

from vfengine.models import PlannedTextEncoder, TextEncoder, TextEncoderConfig

OWN = TextEncoderConfig(
    vocab_size=50,
    max_length=20,
    width=32,
    num_layers=3,
    num_heads=4,
    mlp_width=64,
    causal=False,
    embedding_width=12,
)
IDS = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(0))
CASES = {
    "both": OWN,
    "wide embeddings": replace(OWN, embedding_width=None),
    "causal": replace(OWN, causal=True),
    "odd heads": replace(OWN, width=36, num_heads=3, embedding_width=10),
}


def encoder_of(config: TextEncoderConfig) -> TextEncoder:
    return filled(TextEncoder(config))


def in_pytorch(encoder: TextEncoder, ids: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch's own layers, in float64."""
    config = encoder.config
    x = encoder.embeddings.token_embedding.weight[ids]
    x = (x + encoder.embeddings.position_embedding.weight[: ids.shape[1]]).double()
    if config.embedding_width is not None:
        x = nn.functional.linear(
            x, encoder.projection.weight.double(), encoder.projection.bias.double()
        )
    mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=torch.float64)
    for block in encoder.layers:
        layer = nn.TransformerEncoderLayer(
            config.width, config.num_heads, config.mlp_width, 0.0, "gelu", norm_first=True
        ).double()
        q, k, v, out = (getattr(block.attention, f"to_{part}") for part in ("q", "k", "v", "out"))
        state = {
            "self_attn.in_proj_weight": torch.cat([q.weight, k.weight, v.weight]),
            "self_attn.in_proj_bias": torch.cat([q.bias, k.bias, v.bias]),
            **{f"self_attn.out_proj.{name}": value for name, value in out.state_dict().items()},
        }
        for theirs, ours in (("linear1", block.fc1), ("linear2", block.fc2)):
            state |= {f"{theirs}.{name}": value for name, value in ours.state_dict().items()}
        for name in ("norm1", "norm2"):
            own = getattr(block, name).state_dict()
            state |= {f"{name}.{key}": value for key, value in own.items()}
        layer.load_state_dict(state)
        with torch.no_grad():
            x = layer(x.transpose(0, 1), mask if config.causal else None).transpose(0, 1)
    norm = encoder.norm
    width = (config.width,)
    return nn.functional.layer_norm(x, width, norm.weight.double(), norm.bias.double(), norm.eps)


@pytest.mark.parametrize("case", CASES)
def test_encodes_as_pytorch_does(case):
    config = CASES[case]
    exact = in_pytorch(encoder_of(config), IDS)
    limits = {torch.float32: 1e-5, torch.bfloat16: 0.03}
    with torch.no_grad():
        assert (encoder_of(config)(IDS) - exact).norm() < 1e-5 * exact.norm()
    for dtype, limit in limits.items():
        out = PlannedTextEncoder(encoder_of(config), dtype)(IDS)
        assert out.shape == (3, 11, config.width) and out.dtype is dtype
        assert (out.double() - exact).norm() < limit * exact.norm()


@pytest.mark.parametrize("case", CASES)
def test_a_token_sees_those_after_it_unless_causal(case):
    encoder = PlannedTextEncoder(encoder_of(CASES[case]), torch.float32)
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    same = torch.equal(encoder(IDS)[:, 0], encoder(changed)[:, 0])
    assert same is CASES[case].causal


def test_a_text_is_the_same_in_any_batch():
    encoder = PlannedTextEncoder(encoder_of(OWN), torch.bfloat16)
    whole = encoder(IDS)
    for number in range(len(IDS)):
        assert torch.equal(encoder(IDS[number : number + 1])[0], whole[number])


def test_weights_of_older_configurations_have_their_names():
    plain = TextEncoder(replace(OWN, embedding_width=None)).state_dict()
    assert plain.keys() == TextEncoder(TextEncoderConfig(50, 20, 32, 3, 4, 64)).state_dict().keys()
    added = TextEncoder(OWN).state_dict().keys() - plain.keys()
    assert added == {"projection.weight", "projection.bias"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"causal": 1}, "causal must be True or False, got 1"),
        ({"causal": None}, "causal must be True or False, got None"),
        ({"embedding_width": 0}, "embedding_width must be a positive int below 1048576, got 0"),
        (
            {"embedding_width": 12.0},
            "embedding_width must be a positive int below 1048576, got 12.0",
        ),
        ({"num_layers": True}, "num_layers must be a positive int below 1048576, got True"),
        ({"activation": 3}, "activation must be a name, got 3"),
    ],
)
def test_rejects_entries_of_another_type(changes, words):
    with pytest.raises(ValueError, match=f"TextEncoderConfig: {words}"):
        replace(OWN, **changes)
