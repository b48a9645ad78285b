"""benchmarks/gpu_check.py as far as a machine without a GPU can tell."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import BENCHMARKS, benchmark_file

gpu_check, gpu_results = map(benchmark_file, ("gpu_check", "gpu_run.results"))

ROOT = BENCHMARKS.parent
CHECK = [sys.executable, str(BENCHMARKS / "gpu_check.py")]
LACKING = ("av", "diffusers", "openvino", "flash_attn")  # what a machine with a GPU may not have

# A run whose sections are fakes: DRIVER defines them, each a module on PYTHONPATH.
DRIVER = """
import sys
import gpu_check
from gpu_check import Section
gpu_check.SECTIONS = tuple(Section(*fields) for fields in {sections})
gpu_check.NAMES = tuple(section.name for section in gpu_check.SECTIONS)
gpu_check.Section.module = property(lambda section: "fake_" + section.name)
gpu_check.facts = lambda runner: {{"gpu": "fake"}}
sys.exit(gpu_check.main())
"""
SAY = "import json\nsay = lambda **line: print(json.dumps(line), flush=True)\n"
FAKES = {
    "counts": SAY + "for i in range(10**6): say(case=str(i), metric='count', value=i)",
    "passes": SAY + "say(case='a', status='passed')\nprint('a word to the log')",
    "fails": SAY + "say(case='b', status='failed', note='is wrong')",
    "crashes": SAY
    + "say(case='c', metric='time', value=1.0)\nraise RuntimeError('no kernel image')",
    "hangs": "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    + SAY
    + "say(case='child', metric='pid', value=child.pid)\ntime.sleep(600)",
    "mumbles": SAY + "say(case='d', metric='time', value=float('nan'))\nsay(colour='blue')",
    "late": SAY + "say(case='e', status='passed')",
}


@pytest.fixture
def fakes(tmp_path):
    """Starts a run of fake sections (name, stage, expected, limit, checks); its folder is `out`."""
    for name, source in FAKES.items():
        (tmp_path / f"fake_{name}.py").write_text(source)
    paths = [str(tmp_path), str(BENCHMARKS)]

    def start(*sections: tuple, options: tuple[str, ...] = ()) -> subprocess.Popen:
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER.format(sections=repr(sections)))
        return subprocess.Popen(
            [sys.executable, str(driver), "--dry-run", "--out", str(tmp_path / "out"), *options],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines() if line]


def statuses(lines: list[dict], section: str) -> list[str]:
    return [line["status"] for line in lines if line["section"] == section]


def gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has asked for its exit status yet."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


# -- the real sections -----------------------------------------------------------------------------


def test_dry_run_needs_nothing_that_a_gpu_machine_may_lack(tmp_path):
    """Every section runs on a CPU and writes the format; a peer that is missing costs its rows."""
    for name in LACKING:
        source = f"raise ModuleNotFoundError('{name} is blocked', name='{name}')\n"
        (tmp_path / f"{name}.py").write_text(source)
    done = subprocess.run(
        [*CHECK, "--dry-run", "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lines_of(tmp_path)
    for line in lines:
        gpu_results.validate(line)
    assert {line["status"] for line in lines} >= {"head", "tail", "measured", "passed", "done"}
    ran = {line["section"] for line in lines if line["status"] == "done"}
    assert ran == set(gpu_check.NAMES) - {"build"}
    assert not {name for name in ran if len(statuses(lines, name)) == 1}, "nothing found"
    missing = [x for x in lines if x["status"] == "unavailable"]
    assert {x["section"] for x in missing} == {"unet3d", "prepare unet3d"}
    assert {x["note"] for x in missing} == {"diffusers is not installed"}
    report = [sys.executable, "benchmarks/gpu_report.py", str(tmp_path / "gpu.jsonl")]
    subprocess.run([*report, "--out", str(tmp_path / "gpu.md")], cwd=ROOT, check=True)
    assert "decomposed_noise" in (tmp_path / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: make gpu-check runs")
def test_says_in_one_line_that_there_is_no_gpu(tmp_path):
    done = subprocess.run([*CHECK, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "gpu-check: torch sees no NVIDIA GPU here; nothing was run\n"
    assert lines_of(tmp_path) == []


def test_imports_no_torch():
    code = "import sys, gpu_check; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True)


def test_list_shows_every_section():
    done = subprocess.run([*CHECK, "--list"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in gpu_check.NAMES)
    for section in gpu_check.SECTIONS:
        assert importlib.util.find_spec(section.module), section


@pytest.mark.parametrize("option", ["--only", "--until"])
def test_refuses_a_section_that_is_none(option, tmp_path):
    done = subprocess.run(
        [*CHECK, option, "kernel", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-check: unknown section 'kernel', expected failed or of")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "gpu.jsonl").exists()


def test_only_and_until_choose_sections(tmp_path):
    def names(only=None, until=None, module=None, dry=False):
        return [s.name for s in gpu_check.chosen(only, until, tmp_path, module, dry)]

    assert names() == list(gpu_check.NAMES)
    assert names(until="smoke") == ["build", "ceilings", "smoke"]
    assert names("kernels,peers") == ["build", "prepare peers", "kernels", "peers"]
    assert names("tests,peers") == ["build", "tests", "prepare peers", "peers"]
    assert names("tests,table4") == ["build", "tests", "prepare table4", "table4"]
    assert names("kernels", module=tmp_path) == ["kernels"]
    assert "build" not in names(dry=True)


def test_a_short_budget_has_what_is_worth_most(tmp_path):
    """And nothing is compiled for what does not fit."""
    sections = gpu_check.chosen(None, None, tmp_path, tmp_path, False)
    names = [s.name for s in gpu_check.within(260, sections)]
    start, fit = 0.0, []
    for section in sections:
        if section.prepares:
            continue
        fit += [section.name] if start + section.expected <= 250 else []
        start += section.expected
    wanted = "ceilings smoke tests capture profile table4 kernels"
    assert fit == wanted.split()
    prepared = [name for name in names if name.startswith("prepare")]
    assert prepared == ["prepare table4"]
    assert gpu_check.within(10**6, sections) == sections


def test_only_failed_takes_what_is_not_done(fakes, tmp_path, monkeypatch):
    sections = (
        ("passes", 0, 1, 20),
        ("fails", 0, 1, 20),
        ("crashes", 0, 1, 20),
        ("late", 1, 99, 99),
    )
    fakes(*sections, options=("--budget", "60")).communicate()
    monkeypatch.setattr(gpu_check, "SECTIONS", tuple(gpu_check.Section(*s) for s in sections))
    assert gpu_check._unfinished(tmp_path / "out") == {"fails", "crashes", "late"}


# -- what may go wrong -----------------------------------------------------------------------------


def test_a_section_that_fails_costs_the_others_nothing(fakes, tmp_path):
    sections = ("passes", "fails", "crashes", "mumbles")
    run = fakes(*((name, 0, 1, 30) for name in sections), ("late", 1, 1, 30))
    out, err = run.communicate()
    assert run.returncode == 1, out + err
    lines = lines_of(tmp_path / "out")
    assert statuses(lines, "passes") == ["passed", "done"]
    assert statuses(lines, "fails") == ["failed", "done"]
    assert statuses(lines, "crashes") == ["measured", "failed", "done"]
    assert "no kernel image" in next(
        x["note"] for x in lines if x["status"] == "failed" and x["section"] == "crashes"
    )
    assert statuses(lines, "mumbles") == ["failed", "failed", "done"]  # NaN, and an unknown key
    assert statuses(lines, "late") == ["passed", "done"]
    for line in lines:
        gpu_results.validate(line)
    assert "[passes] a word to the log" in (tmp_path / "out" / "gpu.log").read_text()
    assert "FAILED fails: b: is wrong" in out
    assert lines[0]["status"] == "head" and json.loads(lines[-1]["note"])["exit_status"] == 1


@pytest.mark.parametrize("checks", [True, False])
def test_a_section_that_hangs_is_killed_with_its_children(checks, fakes, tmp_path):
    run = fakes(("hangs", 0, 1, 2, checks), ("late", 1, 1, 30))
    out, err = run.communicate()
    assert run.returncode == (1 if checks else 0), out + err
    lines = lines_of(tmp_path / "out")
    cut = "failed" if checks else "skipped"  # that a figure is missing makes nothing incorrect
    assert statuses(lines, "hangs") == ["measured", cut, "done"]
    assert statuses(lines, "late") == ["passed", "done"]
    assert gone(int(lines[1]["value"]))


def test_what_no_longer_fits_is_skipped_and_said(fakes, tmp_path):
    run = fakes(("passes", 0, 1, 30), ("late", 1, 500, 600), options=("--budget", "100"))
    out, err = run.communicate()
    assert run.returncode == 0, out + err
    lines = lines_of(tmp_path / "out")
    assert statuses(lines, "late") == ["skipped"]
    assert "500 s expected" in next(x["note"] for x in lines if x["section"] == "late")


def test_killed_at_any_moment_it_keeps_every_line(fakes, tmp_path):
    """Ten runs into one file, each killed; what was counted before stands there without a gap."""
    moments, file = random.Random(0), tmp_path / "out" / "gpu.jsonl"
    for _ in range(10):
        size = file.stat().st_size if file.exists() else 0
        run = fakes(("counts", 0, 1, 300))
        while not file.exists() or file.stat().st_size < size + 2000:  # head and a few lines
            assert run.poll() is None
        time.sleep(moments.uniform(0, 0.5))
        run.send_signal(signal.SIGKILL)
        run.communicate()
    results = gpu_results.read(tmp_path / "out" / "gpu.jsonl")
    assert results.cut <= 10
    counted = [[int(x["value"]) for x in run.lines] for run in results.runs]
    assert len(counted) == 10 and all(counted)
    for values in counted:
        assert values == list(range(len(values)))
    page = tmp_path / "gpu.md"
    report = [sys.executable, "benchmarks/gpu_report.py", str(tmp_path / "out" / "gpu.jsonl")]
    subprocess.run([*report, "--out", str(page)], cwd=ROOT, check=True)
    assert "counts" in page.read_text()


def test_stopped_by_a_signal_it_stops_its_sections(fakes, tmp_path):
    run = fakes(("hangs", 0, 1, 300))
    while not any("child" in x for x in _texts(tmp_path / "out" / "gpu.jsonl")):
        assert run.poll() is None
    run.terminate()
    run.communicate()
    assert run.returncode == 128 + signal.SIGTERM
    assert gone(int(lines_of(tmp_path / "out")[1]["value"]))


def _texts(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def test_two_runs_do_not_write_to_one_file(fakes, tmp_path):
    first = fakes(("hangs", 0, 1, 300))
    while not _texts(tmp_path / "out" / "gpu.jsonl"):
        assert first.poll() is None
    second = fakes(("hangs", 0, 1, 300))
    _, err = second.communicate()
    first.terminate()
    first.communicate()
    assert second.returncode == 2
    assert "another run writes to" in err and len(err.splitlines()) == 1


def test_a_wrong_kernel_in_cuda_leaves_triton(fakes):
    """The result of smoke decides which kernels the later sections run."""
    journal = type("Journal", (), {})()
    for contender, expected in (("cuda", True), ("", True), ("triton", False)):
        journal.found = {"smoke": [{"status": "failed", "contender": contender}]}
        assert gpu_check._native_failed(journal) is expected
