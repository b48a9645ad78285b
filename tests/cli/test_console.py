"""The command `vfengine VERB`, and python -m vfengine: verbs, help, names in errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import vfengine
from vfengine.cli import evaluate, generate, train
from vfengine.cli.main import VERBS, main

ROOT = Path(__file__).resolve().parents[2]
NAMES = "generate, serve, train, bench, eval"


@pytest.mark.parametrize(
    ("argv", "problem"), [(["make"], "unknown verb 'make'"), ([], "no verb"), ([""], "no verb")]
)
def test_without_a_known_verb_one_line_names_them(argv, problem, capsys):
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"vfengine: error: {problem}, expected one of: {NAMES}\n"


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith("usage: vfengine VERB [flags]\n")
    assert all(f"  {verb} " in said.out for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vfengine {vfengine.__version__}\n"


def test_the_console_script_is_the_main_of_the_verbs():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.scripts]\nvfengine = "vfengine.cli.main:main"\n' in project


@pytest.mark.parametrize("verb", ["generate", "train", "bench", "eval"])
def test_usage_and_errors_name_the_command_as_it_was_called(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: vfengine {verb} ")
    assert main([verb, "--nonsense"]) == 2
    assert capsys.readouterr().err.startswith(f"vfengine {verb}: error: ")


@pytest.mark.parametrize(
    ("command", "name"),
    [(generate.main, "generate"), (train.main, "train"), (evaluate.main, "eval")],
)
def test_a_door_names_itself(command, name, capsys):
    with pytest.raises(SystemExit):
        command(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m vfengine.{name} ")
    assert command(["--nonsense"]) == 2
    assert capsys.readouterr().err.startswith(f"vfengine.{name}: error: ")


def test_a_verb_gets_the_clock_and_the_rest_of_the_line(tiny_checkpoint, capsys):
    assert main(["generate", "--model", str(tiny_checkpoint), "--list-labels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"labels": ["cartwheel", "jump", "walk"]}


def test_the_package_runs_as_a_module_and_loads_no_torch():
    code = "import sys; from vfengine.cli.main import main; main(['--help']); print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'vfengine.cli.main'" in done.stdout, done.stderr
    assert not any(f"'{heavy}'" in done.stdout for heavy in ("torch", "numpy", "yaml", "asyncio"))
    done = subprocess.run(
        [sys.executable, "-m", "vfengine", "make"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vfengine: error: unknown verb 'make'")
