"""benchmarks/judge_model.py: its judges on tiny data, and the whole command on tiny models."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_LABELS, benchmark_file
from latent_models import save_latent_model
from PIL import Image

from vfengine.training.mocap import ACTIONS, Renderer, draw_scene, render_clips

judges = benchmark_file("lib.judges")
judged_clips = benchmark_file("lib.judged_clips")
judge_model = benchmark_file("judge_model")

FEW = ["--judge-clips", "15", "--judge-scenes", "8", "--judge-steps", "2", "--dtype", "float32"]
FEW += ["--per-action", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def clips():
    return render_clips(15, seed=5, size=64)[0]


def test_a_frozen_clip_tells_the_action_judge_nothing(clips):
    """Whatever is to be seen in it: the same logits for all, and so one right in fifteen."""
    torch.manual_seed(0)
    judge = judges.ActionJudge().eval()
    seen, features = judges.read_actions(judge, judge_model.frozen(clips))
    assert (seen == np.arange(15)).sum() == 1
    assert np.ptp(features, axis=0).max() < 1e-5
    moving = judges.read_actions(judge, clips)[1]
    assert moving.shape == (15, 128) and np.ptp(moving, axis=0).max() > 1e-2


def test_the_attribute_judge_reads_every_attribute(clips):
    torch.manual_seed(0)
    seen, features = judges.read_attributes(judges.AttributeJudge().eval(), clips)
    assert seen.shape == (15, len(judges.ATTRIBUTES)) and features.shape == (15, 96)
    assert np.all(seen < [len(values) for values in judges.ATTRIBUTES.values()])


def test_attributes_of_a_scene_are_its_names():
    scenes = [draw_scene(1, i) for i in range(30)]
    for scene, row in zip(scenes, judges.attributes_of(scenes), strict=True):
        for (name, values), index in zip(judges.ATTRIBUTES.items(), row, strict=True):
            assert values[index] == getattr(scene, name)
    walls = judges.attributes_of(scenes)[:, list(judges.ATTRIBUTES).index("wall")]
    assert {scene.place for scene, wall in zip(scenes, walls, strict=True) if wall == 0} == {"lawn"}


def test_sizes_are_averages_of_areas():
    clips = np.random.default_rng(0).integers(0, 256, (1, 2, 8, 8, 3), np.uint8)
    x = judges.to_input(clips, 4)
    expected = clips.reshape(1, 2, 4, 2, 4, 2, 3).mean((3, 5)) / 127.5 - 1
    assert torch.allclose(x, torch.from_numpy(expected).float().movedim(-1, 2), atol=1e-6)


def test_an_action_judge_improves_on_its_own_clips():
    """The few clips that it learns from: a judge of hardly any steps names fewer of them."""
    clips, labels = render_clips(15, judges.TRAIN_SEED, size=64)
    right = []
    for steps in (1, 40):
        judge = judges.train_action_judge(15, steps, batch=8)
        right.append((judges.read_actions(judge, clips)[0] == labels).sum())
    assert right[0] <= 5 and right[1] >= 12


def test_an_attribute_judge_improves_on_its_own_scenes():
    scenes = [draw_scene(judges.TRAIN_SEED, i, held_out=i % 7 == 0) for i in range(4)]
    clips = Renderer(judges.AttributeJudge.size, 4).clips(scenes).numpy()
    there, right = judges.attributes_of(scenes), []
    for steps in (1, 40):
        judge = judges.train_attribute_judge(4, steps, batch=4)
        right.append((judges.read_attributes(judge, clips)[0] == there).mean())
    assert right[0] < 0.5 and right[1] > 0.8


def test_a_judge_is_trained_once(tmp_path):
    file, judge = tmp_path / "judge.safetensors", judges.ActionJudge()
    kept = judges.kept_judge(file, judges.ActionJudge(), lambda: judge)
    assert kept is judge
    again = judges.kept_judge(file, judges.ActionJudge(), lambda: pytest.fail("trained again"))
    for name, value in judge.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_only_missing_rounds_are_made(tmp_path):
    def make(number):
        asked.append(number)
        return np.full((2, 1, 4, 4, 3), number, np.uint8)

    asked = []
    first = judged_clips.kept_clips(tmp_path / "clips", range(2), make)
    more = judged_clips.kept_clips(tmp_path / "clips", range(3), make)
    assert asked == [0, 1, 2] and np.array_equal(more[:4], first)
    assert more[:, 0, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_rounds_have_a_scene_of_each_action_in_held_out_pairs():
    scenes = [s for i in range(3) for s in judged_clips.scenes_of(3000, ACTIONS, i)]
    assert [scene.action for scene in scenes] == list(ACTIONS) * 3
    assert scenes == [draw_scene(3000, i, held_out=True) for i in range(45)]


@pytest.mark.filterwarnings("ignore:a prompt is cut", "ignore:the text encoder does not know")
def test_it_judges_a_model_of_prompts(tmp_path, capsys):
    """An untrained one, whose clips no judge confuses with real ones; nothing is made twice."""
    model, work = save_latent_model(tmp_path / "model"), tmp_path / "work"
    arguments = ["--model", str(model), "--work", str(work), *FEW]
    arguments += ["--base-path", "clean", "stepwise", "real"]
    written = ["--json", str(tmp_path / "rows.json"), "--sheet", str(tmp_path / "sheet.png")]
    rows = judge_model.main([*arguments, *written])
    said = capsys.readouterr().out
    assert "actions, generated, clean: right" in said and "at least 90.00 %" in said
    made = {"generated, clean", "generated, stepwise", "generated, real"}
    figures = {(row.case, row.contender, row.metric): row.value for row in rows}
    for case, metric in (("actions", "right"), ("attributes", "all"), ("pictures", "speckle")):
        found = {contender for c, contender, m in figures if (c, m) == (case, metric)}
        assert found >= made | {"real", "real, coded"}
    assert figures["distances", "real", "Fréchet, look"] < min(
        figures["distances", contender, "Fréchet, look"] for contender in made
    )
    assert {row.contender for row in rows if row.case == "each action"} == set(TINY_LABELS)
    assert figures["pictures, times real's", "real", "below 4 pixels"] == 1
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0] == vars(rows[0])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 8 * 32 and sheet.height > 3 * 32
    files = [file for file in work.rglob("*.*") if file.suffix in (".npy", ".safetensors")]
    kept = {file: file.stat().st_mtime_ns for file in files}
    assert judge_model.main(arguments) == rows
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_it_judges_a_model_of_labels_beside_given_clips(tiny_checkpoint, tmp_path):
    file = tmp_path / "real.npy"
    clips = render_clips(12, seed=9, size=16, num_frames=4)[0]
    np.save(file, clips)
    arguments = ["--model", str(tiny_checkpoint), "--work", str(tmp_path / "work"), *FEW]
    rows = judge_model.main([*arguments, "--real-clips", str(file)])
    assert {row.contender for row in rows if row.case == "pictures"} == {
        "real",
        "generated, stepwise",
    }
    assert not [row for row in rows if row.case == "attributes"]
    np.save(file, clips[:11])
    with pytest.raises(ValueError, match="expected 12 clips, found 11"):
        judge_model.main([*arguments, "--real-clips", str(file)])


def test_rejects_a_plain_model(tiny_video_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="expected a decomposed model, got vdm"):
        judge_model.main(["--model", str(tiny_video_checkpoint), "--work", str(tmp_path)])
