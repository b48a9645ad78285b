"""Text encoders, read into our own: values, files, what is refused; transformers is the oracle."""

import json
from pathlib import Path

import pytest
import torch
from published_folders import small_diffusers_folder, small_modelscope_folder
from safetensors.torch import load_file, save_file
from seeded import filled
from test_load import copied

from vfengine.formats.load import find_text_encoder
from vfengine.models import PlannedTextEncoder, TextEncoder, TextEncoderConfig, load_text_encoder

TEXTS = ["a panda eats bamboo", "", "word " * 100]
IDS = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(0))
FILE = "model.safetensors"
CASES = {
    "gelu": {"hidden_act": "gelu"},
    "quick gelu": {"hidden_act": "quick_gelu"},
    "one block": {"num_hidden_layers": 1},
    "odd heads": {"hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 50},
    "eps": {"layer_norm_eps": 1e-3},
    "heads of 64": {"hidden_size": 128, "num_attention_heads": 2},
}


def peer_of(case: str):
    from transformers import CLIPTextConfig, CLIPTextModel

    entries = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    entries |= {"num_hidden_layers": 3, "vocab_size": 50, "hidden_act": "gelu"}
    entries |= {"bos_token_id": 48, "eos_token_id": 49, "max_position_embeddings": 20}
    return filled(CLIPTextModel(CLIPTextConfig(**entries | CASES[case])))


def encoded(peer, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return peer(ids).last_hidden_state


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def planned(folder: Path, dtype=torch.float32) -> PlannedTextEncoder:
    """Without a tokenizer, which these small vocabularies have not."""
    return PlannedTextEncoder(find_text_encoder(folder).read(dtype, "cpu"), dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text_encoder")
    peer_of("gelu").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_encodes_as_transformers_does(case, tmp_path):
    peer = peer_of(case)
    peer.save_pretrained(tmp_path)
    exact = encoded(peer.double(), IDS)
    expected = encoded(peer.float(), IDS)
    plain = find_text_encoder(tmp_path).read(torch.float32, "cpu")
    for ours in (plain, planned(tmp_path)):
        out = ours(IDS)
        assert out.shape == expected.shape and out.dtype is torch.float32
        assert error(out, exact) < max(1e-6, 2 * error(expected, exact))
    half = planned(tmp_path, torch.bfloat16)(IDS)
    assert half.dtype is torch.bfloat16
    assert error(half, exact) <= 1.5 * error(encoded(peer.bfloat16(), IDS), exact)


def test_a_whole_folder_with_its_tokenizer(tmp_path):
    from transformers import CLIPTextModel

    folder = small_diffusers_folder(tmp_path / "pipeline")
    peer = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    for source in (folder, folder / "text_encoder"):
        text = load_text_encoder(source, torch.float32)
        ids = text.tokenize(TEXTS)
        assert ids.shape == (3, 77)
        assert (text(ids) - encoded(peer, ids)).abs().max() < 1e-5


def test_both_forms_of_one_encoder_agree(tmp_path):
    """ModelScope's file holds one block more, which is not used, and pictures' layers."""
    folder = small_modelscope_folder(tmp_path / "modelscope")
    diffusers = small_diffusers_folder(tmp_path / "diffusers")
    ours, theirs = (load_text_encoder(source, torch.float32) for source in (folder, diffusers))
    ids = ours.tokenize(TEXTS)
    assert torch.equal(ours(ids), theirs(ids))
    file = load_text_encoder(folder / "open_clip_pytorch_model.bin", torch.float32)
    assert torch.equal(file(ids), ours(ids))


def test_a_text_is_the_same_in_any_batch_and_length(folder):
    ours = planned(folder)
    whole = ours(IDS)
    for number in range(len(IDS)):
        assert torch.equal(ours(IDS[number : number + 1])[0], whole[number])
    assert torch.allclose(ours(IDS[:, :5]), whole[:, :5], atol=1e-6)  # causal


@pytest.mark.parametrize("how", ["text_model.", "positions", ".bin", "shards"])
def test_ways_of_saving(how, folder, tmp_path):
    source = copied(folder, tmp_path)
    state = load_file(source / FILE)
    if how == "text_model.":
        state = {f"text_model.{name}": weight for name, weight in state.items()}
    if how == "positions":
        state["embeddings.position_ids"] = torch.arange(20)[None]
    if how == ".bin":
        (source / FILE).unlink()
        torch.save(state, source / "pytorch_model.bin")
    elif how == "shards":
        (source / FILE).unlink()
        names = sorted(state)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, own in shards.items():
            save_file({name: state[name] for name in own}, source / file)
        index = {name: file for file, own in shards.items() for name in own}
        text = json.dumps({"weight_map": index})
        (source / "model.safetensors.index.json").write_text(text)
    else:
        save_file(state, source / FILE)
    assert torch.equal(planned(source)(IDS), planned(folder)(IDS))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "relu"}, 'hidden_act = "relu" is not supported'),
        ({"model_type": "t5"}, 'model_type = "t5" is not supported'),
        ({"architectures": ["CLIPTextModelWithProjection"]}, "architectures"),
        ({"use_attention_mask": True}, "use_attention_mask = true is not supported"),
        ({"hidden_size": 33}, "hidden_size 33 is no multiple of num_attention_heads 4"),
        ({"hidden_size": "wide"}, "hidden_size must be a positive int below 1048576, got 'wide'"),
        ({"max_position_embeddings": 512}, "max_position_embeddings may be 128 at most, got 512"),
        ({"num_hidden_layers": 4}, "misses weights"),
        ({"num_hidden_layers": 2}, "has weights of no known layer"),
        ({"intermediate_size": 66}, "has weights of other shapes"),
    ],
)
def test_rejects_configurations(changes, words, folder, tmp_path):
    source = copied(folder, tmp_path)
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as caught:
        find_text_encoder(source)
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)


def test_rejects_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="no text encoder in"):
        load_text_encoder(tmp_path)
    torch.save({"visual.x": torch.zeros(1)}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="not an open_clip text encoder: no 'token_embedding"):
        load_text_encoder(tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_text_encoder(tmp_path, torch.float64)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (IDS.int(), TypeError, "ids must be int64, got torch.int32"),
        (IDS[0], ValueError, r"ids must be \[B, 1 … 20\], got \[11\]"),
        (IDS[:, :0], ValueError, "ids must be"),
        (torch.zeros(1, 21, dtype=torch.int64), ValueError, r"got \[1, 21\]"),
        (IDS - 60, ValueError, "ids must lie in 0 … 49, got -"),
        (IDS + 9, ValueError, "ids must lie in 0 … 49"),
    ],
)
def test_rejects_ids(ids, error, words, folder):
    for encoder in (planned(folder), find_text_encoder(folder).read(torch.float32, "cpu")):
        with pytest.raises(error, match=words):
            encoder(ids)


@pytest.mark.parametrize("changes", [{"width": 0}, {"activation": "relu"}, {"num_heads": 3}])
def test_rejects_shapes(changes):
    with pytest.raises(ValueError, match="TextEncoderConfig: "):
        TextEncoder(TextEncoderConfig(**changes))
