"""Published text-to-image models on disk: found and checked, and their files carried elsewhere."""

import json
import shutil

import pytest
from published_images import decomposed_config, image_networks, published_model, save_images

from vfengine.formats import folders
from vfengine.formats.checkpoint import DecomposedConfig
from vfengine.formats.folders import Linked
from vfengine.formats.text_to_image import linked_parts, read_text_to_image


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), image_networks())


def test_configuration_survives_its_file(images):
    config = decomposed_config(images)
    again = DecomposedConfig.from_json(config.to_json())
    assert again == config
    assert again.foreign == ("base", "autoencoder", "text_encoder", "tokenizer")
    trained = decomposed_config(images, trained=True)
    assert trained.foreign == ("autoencoder", "text_encoder", "tokenizer")
    assert [config.table("ddim", 2).timesteps.tolist(), config.base_std] == [[501, 1], 1.0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type must be one of"),
        ({"spacing": []}, "spacing must be one of"),
        ({"steps_offset": -1}, "steps_offset must be an int from 0 on, got -1"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one must be true or false, got 1"),
        ({"beta": 1}, "incomplete or of another version"),
    ],
)
def test_wrong_entries_are_named(images, entries, message):
    values = json.loads(decomposed_config(images).to_json())
    values["published"] |= entries
    with pytest.raises(ValueError, match=message):
        DecomposedConfig.from_json(json.dumps(values))


def test_folders_that_hold_no_such_model_are_refused(images, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(FileNotFoundError, match="it is no folder"):
        read_text_to_image(folder)
    shutil.copytree(images, folder)
    index = folder / "model_index.json"
    index.write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline.* is not one of"):
        read_text_to_image(folder)
    index.write_text('{"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "VQModel"]}')
    with pytest.raises(ValueError, match=r"VQModel.* is not AutoencoderKL"):
        read_text_to_image(folder)
    index.unlink()
    for part in ("scheduler", "unet"):
        shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=r"has no scheduler/\S+json, unet/config\.json"):
        read_text_to_image(folder)


def test_all_files_of_a_network_in_pieces_are_carried(tmp_path):
    published_model.quiet()
    image_networks().unet.save_pretrained(tmp_path / "unet", max_shard_size="100KB")
    part = linked_parts(tmp_path, ("base",))["base"]
    named = {file.name for file in part.files}
    assert named == {file.name for file in (tmp_path / "unet").iterdir()} and len(named) > 3
    before = part.sha256
    (tmp_path / "unet" / "config.json").write_text("{}")
    assert linked_parts(tmp_path, ("base",))["base"].sha256 != before


@pytest.mark.parametrize("links", [True, False])
def test_files_are_linked_or_copied(tmp_path, monkeypatch, links):
    def refused(*names):
        raise OSError("no links here")

    (tmp_path / "blob").write_text("weights")
    (tmp_path / "file").symlink_to("blob")
    (tmp_path / "model").mkdir()
    if not links:
        monkeypatch.setattr(folders.os, "link", refused)
    Linked("vae", (tmp_path / "file",)).place(tmp_path / "model")
    placed = tmp_path / "model" / "vae" / "file"
    assert placed.read_text() == "weights" and not placed.is_symlink()
    assert placed.stat().st_nlink == (2 if links else 1)
