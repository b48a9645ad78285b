"""training/trainer.py: training resumes from a saved state or a checkpoint."""

import os
import stat
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from test_training import assert_equal_states, model_named_by, new_trainer, random_clips, state_of

from vfengine.formats.checkpoint import load_network, read_config


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stop", [0, 2])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, precision, stop):
    whole, first = new_trainer(precision=precision), new_trainer(precision=precision)
    for _ in range(stop):
        whole.step()
        first.step()
    first.save(tmp_path / "state")
    resumed = new_trainer(precision=precision)
    resumed.restore(tmp_path / "state")
    assert resumed.steps_done == stop
    for _ in range(2):
        assert repr(resumed.step()) == repr(whole.step())
    assert_equal_states(state_of(resumed, tmp_path / "a"), state_of(whole, tmp_path / "b"))


def test_states_name_their_model_as_ever(tmp_path):
    """Without later entries of configurations, so that an unfinished training still resumes."""
    trainer = new_trainer(clean_share=0.5)
    assert trainer.config.clean_share == 0.5
    assert model_named_by(trainer, tmp_path / "state") == "60ba0559c4e575b9"


def test_state_of_another_model_is_refused(tmp_path):
    new_trainer().save(tmp_path / "state")
    others = {
        "network": new_trainer(config=tiny_config(lam=0.3)),
        "data": new_trainer(clips=random_clips(5)),
        "seed": new_trainer(seed=1),
    }
    for trainer in others.values():
        before = [parameter.clone() for parameter in trainer.parameters]
        with pytest.raises(ValueError, match="state is the training state of another model"):
            trainer.restore(tmp_path / "state")
        assert trainer.steps_done == 0
        assert all(map(torch.equal, before, trainer.parameters))


def test_truncated_state_is_refused(tmp_path):
    trainer, file = new_trainer(), tmp_path / "state"
    trainer.save(file)
    for length in (file.stat().st_size - 1, 1000, 4, 0):
        os.truncate(file, length)
        with pytest.raises(ValueError, match="state is not a complete training state"):
            trainer.restore(file)
    with pytest.raises(FileNotFoundError):
        trainer.restore(tmp_path / "nowhere")


def test_interrupted_save_leaves_the_old_state(tmp_path, monkeypatch):
    trainer, file = new_trainer(), tmp_path / "state"
    trainer.save(file)
    before = file.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_state_obeys_the_umask(tmp_path):
    trainer = new_trainer()
    umask = os.umask(0o027)
    try:
        trainer.save(tmp_path / "state")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o640


def test_export_writes_the_averaged_weights(tmp_path):
    trainer = new_trainer(ema=0.9)
    trainer.step()
    config = trainer.export(tmp_path / "model")
    exported = load_network(tmp_path / "model", config, "base").unet.state_dict()
    for key, value in trainer.averaged["base"].unet.state_dict().items():
        assert torch.equal(exported[key], value.half().float()), key


def test_export_records_the_clean_share(tmp_path):
    for share in (0.0, 0.75):
        config = new_trainer(clean_share=share).export(tmp_path / "model")
        assert config == read_config(tmp_path / "model")
        assert (config.clean_share, config.animates_pictures) == (share, share > 0)


def test_warm_start_takes_the_weights_that_fit(tmp_path):
    source = new_trainer(ema=0.9)
    source.step()
    source.export(tmp_path / "model")
    same = new_trainer(seed=1)
    assert same.warm_start(tmp_path / "model") == []
    for averages in (same.averages, same.parameters):
        for ours, theirs in zip(averages, source.averages, strict=True):
            assert torch.equal(ours, theirs.half().float())
    config = tiny_config()
    deeper = replace(config.residual, layers_per_block=(1, 2))
    other = new_trainer(config=replace(config, residual=deeper), seed=1)
    fresh = other.warm_start(tmp_path / "model")
    assert fresh and all(name.startswith("residual.") for name in fresh)
    assert not any("conv_in" in name for name in fresh)
    assert torch.equal(
        other.networks["residual"].unet.conv_in.weight,
        source.averaged["residual"].unet.conv_in.weight.half().float(),
    )
