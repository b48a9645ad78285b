"""benchmarks/gpu_report.py and gpu_run/: pages of whole, killed and several runs."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import gpu_lines
import pytest
from conftest import BENCHMARKS, benchmark_file
from gpu_lines import CARD, done, head, line, tail, text, whole_run

ROOT = Path(__file__).resolve().parents[2]


results, findings = map(benchmark_file, ("gpu_run.results", "gpu_run.findings"))
report = benchmark_file("gpu_report")


@pytest.fixture
def page(tmp_path):
    """Lines, or bytes, of a file -> the page made of it; no pictures, which take a second."""

    def make(lines: list[dict] | bytes) -> str:
        file = tmp_path / "gpu.jsonl"
        file.write_bytes(lines if isinstance(lines, bytes) else text(lines).encode())
        return report.page(results.read(file), {})

    return make


def part(page: str, heading: str) -> str:
    """From this heading to the next."""
    start = page.index(f"{heading}\n")
    return re.split(r"\n#+ ", page[start + len(heading) :])[0]


# -- the format ------------------------------------------------------------------------------------


def test_every_line_of_a_run_is_of_the_format():
    lines = whole_run()
    for one in lines:
        results.validate(one)
    assert {one["status"] for one in lines} == set(results.STATUSES)
    assert all(tuple(one) == results.KEYS for one in lines)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"value": float("nan")}, "value"),
        ({"value": True}, "value"),
        ({"value": None}, "needs a value"),
        ({"spread": "3 %"}, "spread"),
        ({"n": 1.5}, "n must"),
        ({"graph": 1}, "graph"),
        ({"dtype": "float32"}, "dtype"),
        ({"status": "ok"}, "status"),
        ({"note": None}, "note"),
        ({"section": ""}, "section"),
        ({"run": ""}, "run"),
        ({"time": -1.0}, "time"),
        ({"status": "head", "note": "no JSON"}, "must be JSON"),
        ({"status": "tail", "note": "[1]"}, "must be an object"),
        ({"extra": 1}, "extra"),
    ],
)
def test_validate_rejects(changes, says):
    with pytest.raises(ValueError, match=says):
        results.validate(line("kernels", value=1.0) | changes)


def test_validate_rejects_what_lacks_a_key_or_is_no_object():
    short = line("kernels", value=1.0)
    del short["dtype"]
    with pytest.raises(ValueError, match="dtype"):
        results.validate(short)
    with pytest.raises(ValueError, match="JSON object"):
        results.validate([1])


# -- a page ----------------------------------------------------------------------------------------


def test_page_of_a_whole_run(page):
    found = page(whole_run())
    for fact in (CARD, "580.65.06", "33f3af2", "2026-01-02", "make gpu-check", "| 61 |"):
        assert fact in found
    assert "0.61 at large, 1 clip (4.50 of 7.40 ms, 1.12 without graphs)" in found
    assert "The paper has 0.425." in found and "The paper has 0.781." in found
    assert "2,987 GB/s" in part(found, "### Ceilings")
    assert "| large, 1 clip | VDM*, our kernels | 12.5 ms |" in part(found, "### Table 4")
    assert "| paper, video | all | 2,185 |" in part(found, "### Kernels of a step")
    assert "racecheck: not available: no compute-sanitizer" in part(found, "### Sanitizers")
    assert "skipped: no time left" in part(found, "### Inside the kernels")
    assert "cut off" not in found and "yet run" not in found


def test_failed_rows_come_first_with_their_reason(page):
    found = page(whole_run())
    verdicts = part(found, "### Verdicts").strip().splitlines()
    assert verdicts[2].startswith("| smoke | **failed** |")
    assert all("failed" not in row for row in verdicts[3:])
    assert r"| smoke | geglu | triton | NaN \| at &lt;row> 3 |" in part(found, "### Failed")
    assert found.index("### Failed") < found.index("### Targets") < found.index("### Ceilings")


def test_targets_are_reached_or_short(page):
    targets = part(page(whole_run()), "### Targets")
    assert "| residual_step, plain, 64x3x512x512, fp32 | 95, reached | 88, **short" in targets
    assert "| group_norm_silu, 16x128x32x32, bf16 | 71, **short by 11 %** |" in targets
    assert "| at most 0.4 of VDM* | large, 1 clip | 0.61, **short by 34 %** |" in targets
    assert "| at most 0.33 of VDM* | paper, 1 clip | 0.38, **short by 12 %** |" in targets
    assert "| at most 0.6 of VDM* | default, 16 clips | 0.71, **short by 15 %** |" in targets
    assert "| paper, 1 clip, memory (reserved) | 0.69, **short by 14 %** |" in targets
    assert (
        "| at least 4 x the speed of plain calls | default clip, 50 steps |  | 4.33, r" in targets
    )
    assert "default, 1 clip" not in targets


def test_peers_are_judged_by_their_best_form(page):
    of = {"section": "peers", "case": "large, 1 clip", "metric": "per step", "unit": "ms"}
    times = {
        "VDM*, captured": 2.0,
        "VDM*, compiled": 9.0,
        "VDM*, compiled, captured": 3.0,
        "diffusers UNet3D, captured": 50.0,
        "diffusers UNet3D, compiled by block, captured": 24.0,
        "diffusers UNet3D, ours, captured": 20.0,
    }
    lines = [line(contender=name, value=value, **of) for name, value in times.items()]
    targets = part(page([head(), *lines, tail()]), "### Targets")
    assert "| at least 1.2 x VDM*, compiled's speed | large, 1 clip | 1.50, reached |" in targets
    assert "1.20, **short by 20 %** |" in targets


def test_a_missed_target_is_never_short_by_nothing():
    verdict = findings.Verdict("an op", "Triton", 89.99, 90, "% of a copy")
    assert "short by 1 %" in str(verdict)


def test_unknown_sections_are_shown(page):
    found = part(page(whole_run()), "### warp shuffles")
    assert "| a new idea | 12,345 |" in found


def test_spread_stands_beside_a_figure_where_it_is_wide(page):
    of = {"section": "kernels", "metric": "time", "unit": "us", "value": 3.5}
    found = page([head(), line(case="a", spread=0.02, **of), line(case="b", spread=0.5, **of)])
    assert "| a | 3.50 µs |" in found and "| b | 3.50 µs (spread 50 %) |" in found


@pytest.mark.parametrize("lines", [None, [], [head(), tail()], [head(), done("smoke")]])
def test_without_figures_the_page_says_not_yet_run(tmp_path, lines):
    file, out = tmp_path / "gpu.jsonl", tmp_path / "gpu.md"
    if lines is not None:
        file.write_text(text(lines))
    assert report.write(results.read(file), out) == [out]
    assert "**Not yet run.**" in out.read_text() and "gpu_check.py" in out.read_text()
    assert [path for path in tmp_path.iterdir() if path != file] == [out]


def test_a_failure_without_any_figure_is_told(page):
    found = page([head(), line("build", status="failed", note="nvcc: no such file")])
    assert "**Not yet run.**" in found
    assert "nvcc: no such file" in part(found, "### Failed")


# -- killed runs -----------------------------------------------------------------------------------


def rows_of(page: str) -> set[str]:
    return {cell for row in page.splitlines() for cell in row.split(" | ")}


@pytest.mark.parametrize("seed", range(10))
def test_cut_anywhere_every_whole_line_is_on_the_page(page, tmp_path, seed):
    """Figures that no two lines share, so that each can be looked for."""
    cases = [
        line("a new section", case=f"case {i}", metric="time", value=1000 + i, unit="ms", note="é")
        for i in range(200)
    ]
    written = "".join(
        json.dumps(one, ensure_ascii=False) + "\n" for one in [head(), *cases, tail()]
    )
    start = len(json.dumps(head())) + 1
    cut = random.Random(seed).randrange(start, len(written.encode()))
    kept = written.encode()[:cut]
    whole = kept.count(b"\n") - 1
    found = page(kept)
    cells = rows_of(found)
    for i in range(min(whole, len(cases))):
        assert f"{1000 + i:,} ms |" in found, f"line {i} of {whole} whole ones is missing"
    assert f"case {whole + 1}" not in cells
    broken = kept.rsplit(b"\n", 1)[1]
    complete = results._parse(broken)[0] is not None  # cut at the very end of a line
    assert ("1 line was cut off" in found) == bool(broken and not complete)
    assert "killed: its last line is missing" in found
    assert "| broken off |" in found or not whole


def test_a_run_appended_to_a_cut_line_is_read_whole(page):
    first = text([head(), line("ceilings", case="copy", metric="time", value=1.25, unit="ms")])
    again = [one | {"run": "second"} for one in (head(commit="abcdef0"), tail())]
    found = page(first.encode()[:-40] + text(again).encode())
    assert "1 line was cut off" in found
    assert "commit abcdef0" in found and "commit 33f3af2" in found


def test_lines_of_another_format_are_counted_and_left_out(page):
    lines = [head(), line("ceilings", case="a", metric="time", value=1.5) | {"status": "fine"}]
    found = page(text(lines).encode() + b"nonsense\n[1, 2]\n\xff\xfe\n")
    assert "4 lines were cut off" in found and "1.50" not in found


# -- several runs ----------------------------------------------------------------------------------


def second(lines: list[dict], **facts: object) -> list[dict]:
    return [one | {"run": "second"} for one in (head(commit="abcdef0", **facts), *lines, tail())]


def test_later_lines_win_and_verdicts_are_of_the_latest_run(page):
    of = {"metric": "per step", "unit": "ms", "dtype": "bf16"}
    first = [
        head(),
        line("capture", case="a", value=7.25, **of),
        line("capture", case="b", value=3.25, **of),
        line("capture", case="b", metric="bits", status="failed", note="differ in frame 3"),
        done("capture", 9),
        line("smoke", case="geglu", status="passed"),
        done("smoke", 3),
        tail(),
    ]
    skipped = line("smoke", status="skipped")
    again = second([line("capture", case="a", value=6.5, **of), done("capture", 8), skipped])
    found = page(first + again)
    capture = part(found, "### Capture")
    assert "6.50 ms" in capture and "7.25 ms" not in capture
    assert "| b | run 1 | 3.25 ms |" in capture, "a figure stays until it is read again"
    assert "differ in frame 3" not in found and "### Failed" not in found
    verdicts = part(found, "### Verdicts")
    assert "| capture | measured | 1 |  | 8 | 2 |" in verdicts
    assert "| smoke | passed |  | 1 | 3 | 1 |" in verdicts, "a skipped section says nothing new"
    assert "Run 1, of commit 33f3af2" in found and "Run 2, of commit abcdef0" in found


def test_what_is_cut_off_again_is_said_of_the_latest_run(page):
    def cut(seconds):
        return [line("peers", status="skipped", note=f"cut off after {seconds} s"), done("peers")]

    peers = part(page([head(), *cut(84), tail()] + second(cut(186))), "### Peers")
    assert "skipped: cut off after 186 s" in peers and "84" not in peers


def test_what_fails_in_a_later_run_has_failed(page):
    first = [head(), line("smoke", case="geglu", status="passed"), done("smoke"), tail()]
    again = second([line("smoke", case="geglu", status="failed", note="NaN"), done("smoke")])
    assert "| smoke | geglu | NaN |" in part(page(first + again), "### Failed")


def test_within_a_run_a_failure_stays(page):
    verdict = {"section": "smoke", "case": "geglu"}
    lines = [line(status="failed", note="NaN", **verdict), line(status="passed", **verdict)]
    assert "| smoke | geglu | NaN |" in part(page([head(), *lines, done("smoke")]), "### Failed")


def test_cards_are_not_mixed(page):
    of = {"section": "ceilings", "case": "copy 2 GiB", "metric": "bandwidth", "unit": "GB/s"}
    first = [head(), line(value=2987, **of), tail()]
    again = [
        x | {"gpu": "NVIDIA H200"} for x in second([line(value=4211, **of)], gpu="NVIDIA H200")
    ]
    found = page(first + again)
    one, two = found.split("## NVIDIA H200\n")
    assert f"## {CARD}\n" in one
    assert "2,987 GB/s" in one and "4,211" not in one
    assert "4,211 GB/s" in two and "2,987" not in two


# -- files and command -----------------------------------------------------------------------------


def test_command_draws_and_needs_no_torch(tmp_path):
    """In a process where torch cannot be imported."""
    file, out = tmp_path / "gpu.jsonl", tmp_path / "gpu.md"
    lines = whole_run()
    other = [x | {"run": "other", "gpu": "NVIDIA H200"} for x in lines]
    file.write_text(text(lines + other))
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1]);"
        "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(BENCHMARKS / "gpu_report.py")
    command = [sys.executable, "-c", code, str(BENCHMARKS), script, str(file), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pictures = [f"gpu-{name}{n}.png" for n in ("", "-2") for name in report.PICTURES]
    assert done.stdout.split() == [str(out), *(str(tmp_path / name) for name in pictures)]
    found = out.read_text()
    for name in pictures:
        assert f"]({name})" in found
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob(".*"))


def test_pictures_leave_out_what_was_not_read():
    plots = benchmark_file("gpu_run.plots")
    kept = [x for x in gpu_lines.clips() if x["contender"] == findings.VDM]
    kept += [x for x in gpu_lines.profile() if "residual" not in x["case"]]
    kept += [x for x in gpu_lines.kernels() if x["contender"] == "triton"][:3]
    figures = {results.key(x): x for x in kept}
    assert plots.draw_table4(figures) is None
    for drawing in (plots.draw_kernels, plots.draw_launches):
        picture = drawing(figures)
        plots.plt.close(picture)
        assert picture is not None
    assert all(drawing({}) is None for drawing in plots.DRAWINGS.values())


def test_contenders_have_the_names_of_table_4():
    ways = benchmark_file("lib.table4_ways")
    names = ways.VDM, ways.TWO_PHASE, ways.BASE_KEPT, ways.OVERLAPPED
    ours = findings.VDM, findings.TWO_PHASE, findings.BASE_KEPT, findings.OVERLAPPED
    assert names == ours
