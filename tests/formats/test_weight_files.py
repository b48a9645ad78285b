"""Which files of a folder hold a network's weights: variants, in parts, and what is none."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from test_load import same_weights
from test_peers import peer_of

from vfengine.formats.weights import open_weights
from vfengine.models import UNet, load_autoencoder, read_unet

STEM = "diffusion_pytorch_model"
SHARDS = {"max_shard_size": "60KB", "variant": "fp16"}
# Spellings of the index and of the parts, {0} for a part's number as in -00001-of-00002.
OLDER = {
    "older": (STEM + ".{1}.fp16.index.json", STEM + "{0}.fp16.{1}"),
    "in front": (STEM + ".fp16.{1}.index.json", STEM + ".fp16{0}.{1}"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    peer_of("plain").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unet(plain) -> UNet:
    return read_unet(plain, torch.float32)


def saved(folder: Path, **how) -> Path:
    peer_of("plain").save_pretrained(folder, **how)
    return folder


def respelled(folder: Path, index: str, part: str, ending: str) -> None:
    old = next(folder.glob("*index*"))
    text = old.read_text()
    for file in folder.glob(f"*-of-*.{ending}"):
        name = part.format(re.search(r"-\d+-of-\d+", file.name)[0], ending)
        file.rename(folder / name)
        text = text.replace(file.name, name)
    old.unlink()
    (folder / index.format("", ending)).write_text(text)


@pytest.mark.parametrize("spelling", ["newer", *OLDER])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_variants_in_parts_are_read(spelling, ending, unet, tmp_path):
    saved(tmp_path, safe_serialization=ending == "safetensors", **SHARDS)
    if spelling != "newer":
        respelled(tmp_path, *OLDER[spelling], ending)
    index = next(tmp_path.glob("*index*"))
    with pytest.warns(UserWarning, match=f"without a variant: {re.escape(index.name)} is read"):
        assert same_weights(read_unet(tmp_path, torch.float32), unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that was named needs no word
        assert same_weights(read_unet(index, torch.float32), unet)


@pytest.mark.parametrize("how", [{}, {"safe_serialization": False}], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_a_variant_alone_is_read_with_a_word(variant, how, unet, tmp_path):
    saved(tmp_path, variant=variant, **how)
    with pytest.warns(UserWarning, match=f"{variant}.* is read"):
        assert same_weights(read_unet(tmp_path, torch.float32), unet)


def test_weights_without_a_variant_come_first(plain, unet, tmp_path):
    saved(tmp_path, safe_serialization=False)
    (tmp_path / f"{STEM}.fp16.safetensors").write_bytes(b"of no matter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_weights(read_unet(tmp_path, torch.float32), unet)


def test_several_variants_are_named_but_for_fp16(unet, tmp_path):
    saved(tmp_path, variant="bf16")
    saved(tmp_path, variant="non_ema")
    names = rf"{STEM}.bf16.safetensors, {STEM}.non_ema.safetensors; name one of the files"
    with pytest.raises(FileNotFoundError, match=names):
        read_unet(tmp_path)
    chosen = read_unet(tmp_path / f"{STEM}.bf16.safetensors", torch.float32)
    assert same_weights(chosen, unet)
    saved(tmp_path, variant="fp16")
    with pytest.warns(UserWarning, match=r"fp16.safetensors is read"):
        assert same_weights(read_unet(tmp_path, torch.float32), unet)


def test_files_of_other_names_are_named(unet, tmp_path):
    saved(tmp_path)
    (tmp_path / f"{STEM}.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "flax_model.msgpack").write_bytes(b"")
    message = (
        rf"has none of {STEM}.safetensors.*, but flax_model.msgpack, model.safetensors: a file"
    )
    with pytest.raises(FileNotFoundError, match=message):
        read_unet(tmp_path)
    assert same_weights(read_unet(tmp_path / "model.safetensors", torch.float32), unet)


@pytest.mark.parametrize("weight_map", [{}, None, [], {"a": 1}, {"a": "../b.bin"}])
def test_an_index_of_no_files_is_refused(weight_map, plain, tmp_path):
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    index = tmp_path / f"{STEM}.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="its weight_map must name files beside it"):
        read_unet(index)


def test_a_part_that_is_missing_is_named(tmp_path):
    saved(tmp_path, **SHARDS)
    part = min(tmp_path.glob("*-of-*"))
    part.unlink()
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match=part.name):
        read_unet(tmp_path)


def test_one_part_of_several_is_refused_by_name(tmp_path):
    saved(tmp_path, **SHARDS)
    for part in tmp_path.glob("*-of-*"):
        with pytest.raises(ValueError, match=f"{part.name} is one of [0-9]+ files: name their"):
            read_unet(part)


def test_a_part_that_is_the_only_one_is_read(plain, tmp_path):
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    part = tmp_path / f"{STEM}-00001-of-00001.safetensors"
    part.write_bytes((plain / f"{STEM}.safetensors").read_bytes())
    assert read_unet(part, torch.float32).config == read_unet(plain, torch.float32).config


def test_autoencoders_have_variants_too(tmp_path):
    from diffusers import AutoencoderKL

    peer = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8)
    peer.save_pretrained(tmp_path, max_shard_size="30KB", variant="fp16")
    with pytest.warns(UserWarning, match="index.fp16.json is read"):
        load_autoencoder(tmp_path, torch.float32)


# -- what is no file of weights --------------------------------------------------------------------


class _Code:
    def __reduce__(self):
        return (print, ("run",))


def _pickled(content: object) -> bytes:
    import io

    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (_pickled({"a": _Code()}), "it names print, and code is not run"),
        (_pickled({"a": torch.zeros(99)})[:-30], "it is damaged, or no pickle"),
        (b"", "it is damaged, or no pickle"),
        (b"garbage", "it is damaged, or no pickle"),
        (b"\x80\x02", "it is damaged, or no pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS"),
        (_pickled({1: torch.zeros(1)}), "is not a dict of tensors"),
        (_pickled({"a": 1}), "is not a dict of tensors"),
        (_pickled([torch.zeros(1)]), "is not a dict of tensors"),
        (_pickled({"a": torch.eye(3).to_sparse()}), "a of torch.sparse_coo"),
        (_pickled({"a": torch.zeros(3, device="meta")}), "a of no values"),
    ],
)
def test_pickles_that_hold_no_weights(content, message, tmp_path, capsys):
    """One line of our own: torch's words give the advice to run the file's code."""
    file = tmp_path / "weights.bin"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        open_weights([file])
    words = str(refused.value)
    assert words.startswith(str(file)) and "\n" not in words
    assert "weights_only" not in words and "option" not in words
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None
    assert capsys.readouterr().out == ""


def test_a_pointer_in_place_of_safetensors_is_named(plain, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="not downloaded yet: it is a pointer of Git LFS"):
        open_weights([file])
