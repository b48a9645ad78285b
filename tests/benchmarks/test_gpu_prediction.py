"""benchmarks/gpu_run/prediction.py, and the counts behind it (lib/step_costs.py)."""

import subprocess
import sys

import pytest
from conftest import BENCHMARKS, benchmark_file
from gpu_lines import text, whole_run

prediction, results = map(benchmark_file, ("gpu_run.prediction", "gpu_run.results"))
report = benchmark_file("gpu_report")
CARD = prediction.Ceilings(500e12, 2e12)
STEP = prediction.Counts(kernels=100, flops=10**12, bytes=10**9)
COUNTED = prediction.Counted(
    "abc1234", {"large": dict.fromkeys(("base", "residual", "video"), STEP)}
)


@pytest.fixture
def found(tmp_path):
    def make(lines: list[dict]):
        file = tmp_path / "gpu.jsonl"
        file.write_text(text(lines))
        return results.read(file)

    return make


def count(folder, size: str) -> prediction.Counted:
    """What count_steps.py writes of this size, and prints."""
    out = folder / "gpu-counts.json"
    command = [sys.executable, str(BENCHMARKS / "count_steps.py"), "--sizes", size]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted = prediction.read(out)
    assert f"{size}, base: {counted.sizes[size]['base'].kernels} kernels" in done.stdout
    return counted


def test_the_terms_are_the_nodes_the_arithmetic_and_the_bytes():
    assert CARD.terms(STEP) == pytest.approx((100 * prediction.NODE, 2e-3, 0.5e-3))
    assert STEP + STEP == prediction.Counts(200, 2 * 10**12, 2 * 10**9)


def test_predicted_stands_beside_measured(found):
    _, words, table = prediction.chapter(found(whole_run()), COUNTED)
    assert "741 TFLOP/s" in words and "2,987 GB/s" in words and "abc1234" in words
    rows = table.splitlines()[2:]
    assert "| 0.47 ms | 1.35 ms | 0.33 ms | 2.15 ms |  | 1.71 ms |" in rows[0]
    assert "| 4.31 ms | 2.00 | 4.50 ms |" in rows[3]
    assert [row.split(" | ")[1] for row in rows] == ["base", "residual", "VDM*", "two phases"]
    assert "| 7.40 ms |" in rows[2] and "| 4.50 ms |" in rows[3]


def test_what_no_gpu_has_run_is_not_yet_run(found):
    lines = [x for x in whole_run() if x["section"] not in ("table4", "profile")]
    _, _, table = prediction.chapter(found(lines), COUNTED)
    assert table.count("not yet run") == 4


def test_nothing_is_predicted_without_counts_or_ceilings(found):
    lines = [x for x in whole_run() if x["section"] != "ceilings"]
    assert prediction.chapter(found(lines), COUNTED) == []
    assert prediction.chapter(found(whole_run()), prediction.NOTHING) == []


def test_a_step_is_counted_without_a_gpu(tmp_path):
    """The tiny size: all its networks, and nothing in them that needs a GPU."""
    counted = count(tmp_path, "tiny")
    counts = counted.sizes["tiny"]
    assert list(counts) == ["base", "residual", "video"]
    assert counts["base"].kernels < counts["video"].kernels < 2000
    assert 0 < counts["residual"].flops < counts["video"].flops
    assert prediction.read(tmp_path / "none.json") == prediction.NOTHING
    assert counted.commit


@pytest.mark.slow
@pytest.mark.parametrize("size", ["default", "large", "paper"])
def test_no_kernel_creeps_back(size, tmp_path):
    """A step launches at most so many, a group norm counted twice."""
    most = {
        "default": {"base": 120, "residual": 170, "video": 180},
        "large": {"base": 260, "residual": 350, "video": 350},
        "paper": {"base": 410, "residual": 480, "video": 590},
    }
    counts = count(tmp_path, size).sizes[size]
    for name, limit in most[size].items():
        assert counts[name].kernels <= limit, name


def test_a_page_has_the_table(found):
    page = report.page(found(whole_run()), {}, counts=COUNTED)
    assert page.index("### Targets") < page.index("### Predicted and measured")
