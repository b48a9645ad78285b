"""The command line makes an engine's clips again from their own files, byte for byte."""

import json
from dataclasses import replace

import pytest
from latent_models import PROMPTS, save_latent_model
from published_folders import small_diffusers_folder
from serving_engines import engine_of, run_all
from serving_jobs import add, settings_of

from vfengine.cli.generate import main
from vfengine.media.metadata import read_metadata
from vfengine.serving.jobs import SPRITESHEET, THUMBNAIL
from vfengine.serving.store import Store


def told_by(file):
    """The settings that a file says of its clip, but for those of the file itself."""
    record = json.loads(read_metadata(file))
    return {k: v for k, v in record["settings"].items() if k not in ("codec", "crf", "chroma")}


@pytest.mark.parametrize("text", [False, True], ids=["latents", "published"])
def test_clips_of_an_engine_are_made_again(text, tmp_path):
    save = small_diffusers_folder if text else save_latent_model
    folder, store = save(tmp_path / "model"), Store(tmp_path / "store", durable=False)
    prompt = "a panda eats bamboo" if text else PROMPTS[0]
    clip = settings_of(prompt=prompt, format="mp4", scale=2)
    names = add(store, clip, replace(clip, format="webm", loop=True, solver="unipc"))
    run_all(engine_of(folder, store, batch_size=4))
    for name in names:
        made = store.file(name, store.get(name).settings.video_file)
        again = tmp_path / f"again{made.suffix}"
        words = ["--config", str(made), "--output", str(again), "--device", "cpu"]
        assert main([*words, "--model", str(folder), "--quiet"]) == 0
        assert again.read_bytes() == made.read_bytes()
        assert told_by(store.file(name, SPRITESHEET)) == told_by(made)
        look = told_by(store.file(name, THUMBNAIL))
        same = ("prompt", "num_inference_steps", "guidance_scale", "solver", "scale")
        assert all(look[key] == told_by(made)[key] for key in same)
        assert "residual_seed" not in look and look.get("preview", False) is not text
    store.close()
