"""generate --prompts FILE: lines, names, seeds, failures, --resume, streams, interrupts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import frames_of, refused
from latent_models import save_latent_model
from published_folders import small_diffusers_folder

from vfengine.cli import job
from vfengine.pipelines.session import Session


def lines_of(result):
    """The lines of JSON on stdout."""
    return [json.loads(line) for line in result[1].splitlines()]


@pytest.fixture
def prompts(cli):
    """Runs generate with the given text as --prompts FILE: (status, lines of JSON, stderr)."""

    def run(text, *argv, file="lines", **options):
        Path(file).write_text(text, encoding="utf-8")
        result = cli("--prompts", file, *argv, **options)
        return result[0], lines_of(result), result[2]

    return run


def clips_here():
    return sorted(name for name in os.listdir() if not name.startswith("lines"))


def test_each_line_of_text_is_a_clip_with_seeds_of_its_own(prompts, cli):
    text = "# comment\nwalk\n\n  jump\r\n#walk\ncartwheel"
    status, lines, err = prompts(text, "--seed", 5, "--output", "{index:02d}-{prompt}-{seed}.webp")
    assert (status, err) == (0, "")
    names = ["00-walk-5.webp", "01-jump-6.webp", "02-cartwheel-7.webp"]
    assert clips_here() == names
    assert [line["files"] for line in lines] == [[name] for name in names]
    assert [(line["index"], line["line"]) for line in lines] == [(0, 2), (1, 4), (2, 6)]
    assert [line["base_seed"] for line in lines] == [5, 6, 7]
    assert lines[1]["settings"]["label"] == "jump" and lines[1]["timings"]["total"] > 0
    cli("--label", "jump", "--seed", 6, "--output", "alone.webp")
    assert np.array_equal(frames_of("alone.webp"), frames_of(names[1]))


def test_a_line_alone_has_all_the_command_needs_to_make_it_again(prompts, cli):
    entries = {"label": "walk", "num_frames": 6, "solver": "dpmsolver++", "residual_seed": 40}
    _, (_, line), _ = prompts(
        f'{{"label": "jump"}}\n{json.dumps(entries)}', "--output", "{index}.webp"
    )
    assert (line["base_seed"], line["residual_seed"]) == (1, 40)
    settings = {name: value for name, value in line["settings"].items() if value not in (None, "")}
    seeds = {"base_seed": line["base_seed"], "residual_seed": line["residual_seed"]}
    again = {**settings, **seeds, "output": "again.webp", "dtype": "float32"}
    again = {name: value for name, value in again.items() if name not in ("model", "device")}
    Path("lines.json").write_text(json.dumps(again))
    assert cli("--config", "lines.json")[0] == 0
    assert np.array_equal(frames_of("again.webp"), frames_of("1.webp"))


def test_objects_have_settings_of_their_own_over_the_commands(prompts):
    text = (
        '{"num-frames": 3}\n{"label": "jump", "output": "own.gif", "seed": 9}\n{"num_videos": 2}\n'
    )
    status, lines, err = prompts(
        text, "--label", "walk", "--num-frames", 5, "--output", "{label}.{index}.webp"
    )
    assert (status, err) == (0, "")
    assert [line["files"] for line in lines] == [
        ["walk.0.webp"],
        ["own.gif"],
        ["walk.2-000.webp", "walk.2-001.webp"],
    ]
    assert [line["settings"]["num_frames"] for line in lines] == [3, 5, 5]
    assert (lines[1]["base_seed"], lines[1]["residual_seed"]) == (9, 10)


def test_seeds_of_the_command_hold_for_all_lines(prompts):
    text = '{"label": "walk"}\n{"label": "walk"}\n{"label": "walk", "seed": 70}'
    _, lines, _ = prompts(text, "--base-seed", 4)
    assert [(line["base_seed"], line["residual_seed"]) for line in lines] == [
        (4, 1),
        (4, 2),
        (70, 71),
    ]


def test_default_names_count_and_show_what_a_line_shows(prompts):
    prompts("walk\nwalk")
    assert clips_here() == ["0000-walk.mp4", "0001-walk.mp4"]


def test_missing_folders_are_made(prompts):
    assert prompts("walk\njump", "--output", "a/{label}/{index}.webp")[0] == 0
    assert frames_of("a/walk/0.webp").shape == frames_of("a/jump/1.webp").shape


def test_weights_are_read_once(prompts, monkeypatch, tmp_path_factory):
    read = []
    load = Session.load
    monkeypatch.setattr(Session, "load", lambda self, name: read.append(name) or load(self, name))
    model = save_latent_model(tmp_path_factory.mktemp("models") / "latent")
    assert prompts("a person\nin red\nin blue", model=model)[0] == 0
    assert read == ["text", "base", "residual", "decode"]


# -- lines that fail -------------------------------------------------------------------------------


def test_a_line_that_fails_stops_no_other(prompts, monkeypatch):
    text = "\n".join(
        [
            '{"label": "walk"}',
            '{"label": "fly"}',
            '{"lable": "walk"}',
            '{"label": "walk", "num_frames": 0}',
            '{"label": "walk", "model": "elsewhere"}',
            '{"label": "walk", "output": "a.avi"}',
            '{"label": "jump"}',
        ]
    )
    status, lines, err = prompts(text)
    assert status == 1
    assert clips_here() == ["0000-walk.mp4", "0006-jump.mp4"]
    words = ["unknown label 'fly'", "'lable'", "got '0'", "--model of the command", "'.avi'"]
    for line, number, word in zip(lines[1:6], range(2, 7), words, strict=True):
        assert (line["index"], line["line"]) == (number - 1, number)
        assert word in line["error"]
        assert f"vfengine.generate: error: line {number}: {line['error']}\n" in err
    assert err.endswith("\nvfengine.generate: error: 5 of 7 lines failed: 2, 3, 4, 5, 6\n")
    assert err.count("\n") == 6


def test_trouble_while_sampling_is_a_lines_own(prompts, monkeypatch):
    write_clip = job.write_clip

    def fails_for_jump(target, frames, settings, *more):
        if settings.label == "jump":
            raise RuntimeError("no\nluck")
        write_clip(target, frames, settings, *more)

    monkeypatch.setattr(job, "write_clip", fails_for_jump)
    status, lines, err = prompts("jump\nwalk")
    assert (status, lines[0]["error"]) == (1, "RuntimeError: no luck")
    assert lines[1]["files"] == clips_here() == ["0001-walk.mp4"]
    assert "Traceback" not in err


def test_an_interrupt_names_what_is_complete(prompts, monkeypatch):
    write_clip = job.write_clip

    def interrupted(target, frames, settings, *more):
        if settings.label == "jump":
            raise KeyboardInterrupt
        write_clip(target, frames, settings, *more)

    monkeypatch.setattr(job, "write_clip", interrupted)
    status, lines, err = prompts("walk\njump\nwalk")
    assert (status, len(lines)) == (130, 1)
    assert err == "vfengine.generate: interrupted (complete: 0000-walk.mp4)\n"
    assert clips_here() == ["0000-walk.mp4"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("lines.txt", "# nothing\n\n", "no prompts"),
        ("lines.jsonl", "\nwalk\n{", "line 2: no JSON"),
        ("lines.jsonl", '["jump"]', "line 1: expected an object"),
        ("lines", '{"a": ' + "[" * 5000, "line 1: no JSON"),
        ("lines.txt", b"\xff\n", "line 1: not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_before_the_model_is(cli, file, content, words):
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(cli("--prompts", file, model="no model"), f"--prompts {file}", words)
    assert clips_here() == []


def test_a_line_that_cannot_be_read_stops_no_other(cli):
    content = b'{"label": \n\n["jump"]\n\xff\n{"label": "walk"}\n'
    Path("lines.jsonl").write_bytes(content)
    status, out, err = cli("--prompts", "lines.jsonl")
    told = [json.loads(line) for line in out.splitlines()]
    for line, words in zip(told, ("no JSON", "expected an object", "not UTF-8"), strict=False):
        assert words in line["error"] and line["files"] == []
    assert [line["line"] for line in told] == [1, 3, 4, 5]
    assert (status, told[-1]["files"]) == (1, ["0003-walk.mp4"])
    assert err.splitlines()[-1] == "vfengine.generate: error: 3 of 4 lines failed: 1, 3, 4"


def test_a_missing_file_of_prompts_is_refused(cli):
    refused(cli("--prompts", "none.txt", model="no model"), "--prompts none.txt: No such file")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--output", "{indx}.mp4"], ("{indx}", "{index}", "{residual_seed}")),
        (["--output", "{}.mp4"], ("unknown field {}",)),
        (["--output", "{index.real}.mp4"], ("unknown field {index.real}",)),
        (["--output", "{index!r}.mp4"], ("width of digits",)),
        (["--output", "{index:>999999999}.mp4"], ("width of digits",)),
        (["--output", "{index.mp4"], ("--output",)),
        (["--output", "{index}.avi"], ("unknown suffix '.avi'",)),
        (["--prompt", "a walk"], ("--prompt cannot go with --prompts",)),
        (["--label", "walk"], ("--label cannot go with --prompts",)),
        (["--list-labels"], ("--prompts cannot go with --list-labels",)),
        (["--save-latents", "a.safetensors"], ("--prompts cannot go with --save-latents",)),
    ],
)
def test_bad_flags_beside_prompts(cli, argv, words):
    Path("lines.txt").write_text("walk\njump\n")
    refused(cli("--prompts", "lines.txt", *argv, model="no model"), *words)


def test_a_clip_of_a_line_makes_itself_again(prompts, cli):
    prompts('{"label": "walk"}\n{"label": "jump", "num_videos": 2}', "--seed", 8)
    refused(cli("--prompts", "lines", "--config", "0000-walk.mp4"), "--prompts cannot go with")
    for name in ("0000-walk.mp4", "0001-jump-001.mp4"):
        assert cli("--config", name, "--output", "again.mp4")[0] == 0
        assert Path("again.mp4").read_bytes() == Path(name).read_bytes()


def test_resume_needs_prompts(cli):
    refused(cli("--label", "walk", "--resume"), "--resume needs --prompts")


@pytest.mark.parametrize("output", ["a.mp4", "{label}.mp4"])
def test_lines_that_would_share_a_file_are_refused(cli, output):
    Path("lines.txt").write_text("walk\njump\nwalk\n")
    status, out, err = cli("--prompts", "lines.txt", "--output", output)
    assert (status, out, clips_here()) == (2, "", [])
    assert "share the file" in err and "{index}" in err


def test_braces_may_be_written(prompts):
    assert prompts("walk", "--output", "{{{index}}}.webp")[0] == 0
    assert clips_here() == ["{0}.webp"]


# -- prompts ---------------------------------------------------------------------------------------


def test_prompts_name_files_by_their_words_alone(prompts, tmp_path_factory):
    model = save_latent_model(tmp_path_factory.mktemp("models") / "latent")
    text = "../../etc/A person, walking!\n/\n{walking}\n" + "person " * 40
    status, lines, _ = prompts(text, "--quiet", "--json", model=model, steps="2")
    assert status == 0
    assert clips_here() == [
        "0000-etc-a-person-walking.mp4",
        "0001-clip.mp4",
        "0002-walking.mp4",
        "0003-person-person-person-person-person-person-person-person.mp4",
    ]
    assert lines[0]["settings"]["prompt"] == "../../etc/A person, walking!"


def test_a_text_to_video_model_takes_lines(prompts, tmp_path_factory):
    model = small_diffusers_folder(tmp_path_factory.mktemp("published") / "diffusers")
    text = "A panda\nA walk"
    flags = ["--num-frames", 2, "--seed", 3, "--output", "{seed}-{prompt}.webp"]
    status, lines, err = prompts(text, *flags, model=model, steps="2")
    assert (status, err, clips_here()) == (0, "", ["3-a-panda.webp", "4-a-walk.webp"])
    assert [line["seed"] for line in lines] == [3, 4]


# -- resume ----------------------------------------------------------------------------------------


def test_resume_makes_what_is_missing(prompts):
    text = '{"label": "walk"}\n{"label": "jump", "num_videos": 2}\n{"label": "fly"}'
    prompts(text)
    before = {name: Path(name).stat().st_mtime_ns for name in clips_here()}
    os.remove("0001-jump-001.mp4")
    Path(".0001-jump-001.mp4.abc.part").write_bytes(b"half")
    status, lines, err = prompts(text, "--resume")
    assert status == 1 and "unknown label" in err
    assert lines[0] == {"index": 0, "line": 1, "files": ["0000-walk.mp4"], "skipped": True}
    assert lines[1]["files"] == ["0001-jump-000.mp4", "0001-jump-001.mp4"]
    assert "skipped" not in lines[1] and "error" in lines[2]
    assert Path("0000-walk.mp4").stat().st_mtime_ns == before["0000-walk.mp4"]
    assert prompts(text.rpartition("\n")[0], "--resume", "--quiet") == (0, [], "")


def test_resume_writes_a_base_path_that_an_interrupt_left_out(prompts, monkeypatch):
    text = '{"label": "walk"}\n{"label": "walk"}'
    argv = ["--base-trajectory", "t.safetensors", "--output", "{index}.webp"]
    prompts(text, *argv)
    expected = {name: Path(name).read_bytes() for name in ("0.webp", "1.webp", "t.safetensors")}
    for name in expected:
        os.remove(name)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(job, "write_trajectory", interrupted)
        assert prompts(text, *argv)[0] == 130
    assert clips_here() == ["0.webp"]
    status, lines, _ = prompts(text, *argv, "--resume")
    assert (status, ["skipped" in line for line in lines]) == (0, [False, False])
    assert {name: Path(name).read_bytes() for name in expected} == expected
    _, lines, _ = prompts(text, *argv, "--resume")
    assert ["skipped" in line for line in lines] == [True, True]


# -- streams ---------------------------------------------------------------------------------------


def test_lines_of_a_stream_are_made_as_they_come(cli, tiny_checkpoint):
    command = [sys.executable, "-m", "vfengine", "generate", "--prompts", "-", "--device", "cpu"]
    command += ["--model", str(tiny_checkpoint), "--num-inference-steps", "2"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True, bufsize=1) as run:
        told = []
        for line in ("walk", "fly", "jump"):
            run.stdin.write(f"# as they come\n{line}\n")
            run.stdin.flush()
            told.append(json.loads(run.stdout.readline()))
        run.send_signal(signal.SIGINT)
        assert run.wait() == 130
        err = run.stderr.read()
    assert [line.get("files") for line in told] == [["0000-walk.mp4"], [], ["0002-jump.mp4"]]
    assert [line["line"] for line in told] == [2, 4, 6]
    assert err.splitlines()[-1] == (
        "vfengine generate: interrupted (complete: 0000-walk.mp4, 0002-jump.mp4)"
    )


def test_a_stream_needs_names_that_differ(cli, monkeypatch):
    refused(cli_stream(cli, monkeypatch, b"walk\n", "--output", "a.mp4"), "needs {index}")
    refused(cli_stream(cli, monkeypatch, b"\n#\n"), "--prompts -: no prompts")
    status, out, err = cli_stream(cli, monkeypatch, b'{"label"\n{"label": "walk"}\n')
    first, second = map(json.loads, out.splitlines())
    assert (status, second["files"]) == (1, ["0001-walk.mp4"]) and "no JSON" in first["error"]
    assert err.splitlines()[-1] == "vfengine.generate: error: 1 of 2 lines failed: 1"
    content = b'\xef\xbb\xbf{"label": "walk"}\n{"label": "walk"}\nwalk\n'
    status, out, _ = cli_stream(cli, monkeypatch, content, "--output", "{label}.mp4")
    first, second, third = map(json.loads, out.splitlines())
    assert (status, first["files"]) == (1, ["walk.mp4"])
    assert "lines 1 and 2 share" in second["error"] and "no JSON" in third["error"]


def cli_stream(cli, monkeypatch, content, *argv):
    """A run with this content on stdin."""
    Path("stream").write_bytes(content)
    with open("stream") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        return cli("--prompts", "-", *argv)
