"""benchmarks/judge_few_steps.py: a model, its student and reused features, judged and drawn."""

import json

import pytest
from conftest import benchmark_file
from few_step_models import save_latent_student
from latent_models import save_latent_model
from PIL import Image

judge_few_steps = benchmark_file("judge_few_steps")

FEW = ["--judge-clips", "15", "--judge-scenes", "8", "--judge-steps", "2", "--dtype", "float32"]
FEW += ["--per-action", "1", "--turns", "1"]


@pytest.mark.filterwarnings("ignore:a prompt is cut", "ignore:the text encoder does not know")
def test_ways_are_judged_timed_and_drawn(tmp_path, capsys):
    model, student = save_latent_model(tmp_path / "m"), save_latent_student(tmp_path / "s")
    part = save_latent_student(tmp_path / "p", ("base",))
    file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    command = ["--model", str(model), "--students", str(student), str(part)]
    command += [
        "--steps",
        "2",
        "6",
        "--solver",
        "ddim",
        "unipc",
        "--reuse-every",
        "residual=3",
        *FEW,
    ]
    command += ["--work", str(tmp_path / "w")]
    rows = judge_few_steps.main([*command, "--json", str(file), "--plot", str(plot)])
    ways = ["ddim, 6", "ddim, 2", "unipc, 2", "distilled, 4"]
    ways += ["base network distilled, 4"]
    ways += ["features reused, every base=1,residual=3"]
    assert [row.contender for row in rows if row.case == "clip"] == ways
    judged = {row.contender for row in rows if row.case == "distances"}
    assert judged >= {*ways, "real", "real, coded"}
    said = capsys.readouterr().out
    assert "actions, distilled, 4: right" in said and "ddim, 6: right" not in said
    assert json.loads(file.read_text())["rows"][0] == vars(rows[0])
    with Image.open(plot) as drawn:
        assert drawn.size == (1000, 620)
    plot.unlink()
    assert judge_few_steps.main(["--draw", str(file), "--plot", str(plot)]) == []
    assert plot.exists()


def test_bounds_are_a_tenth_from_the_most_steps():
    case, metric, _, _ = judge_few_steps.SHOWN[0]
    row = judge_few_steps.Row
    rows = [row(case, "most", metric, 50.0, "") for case, metric, _, _ in judge_few_steps.JUDGED]
    bounds = judge_few_steps.targets(rows, "most", ["few"])
    assert [bound.value for bound in bounds] == pytest.approx([45, 45, 45, 55, 55, 55, 45, 55])
    assert [bound.at_most for bound in bounds] == [False] * 3 + [True] * 3 + [False, True]
    assert (bounds[0].case, bounds[0].contender, bounds[0].metric) == (case, "few", metric)


def test_a_model_that_is_no_student_is_named(tmp_path):
    model = save_latent_model(tmp_path / "m")
    command = ["--model", str(model), "--students", str(model), "--work", str(tmp_path / "w"), *FEW]
    with pytest.raises(ValueError, match="m: expected a student, whose base network is"):
        judge_few_steps.main(command)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--work FOLDER is needed"),
        (["--draw", "x.json"], "--draw needs --plot"),
        (["--work", "w", "--plot", "x.png"], "--plot draws what --json FILE keeps"),
    ],
)
def test_flags_of_few_steps_that_do_not_fit_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        judge_few_steps.main(flags)
    assert ended.value.code == 2 and words in capsys.readouterr().err
