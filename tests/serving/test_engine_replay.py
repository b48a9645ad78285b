"""The command line makes an engine's clips again from their own files, byte for byte."""

from dataclasses import replace

import pytest
from latent_models import PROMPTS, save_latent_model
from published_folders import small_diffusers_folder
from serving_engines import engine_of, run_all
from serving_jobs import add, settings_of

from vfengine.cli.generate import main
from vfengine.serving.store import Store


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
    store.close()
