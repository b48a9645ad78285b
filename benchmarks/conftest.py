"""pytest benchmarks/ --benchmark-only [--short]: also prints each file's seconds and its limit.

--short runs every bench once at its smallest size, so that all of its code runs. Its figures mean
nothing.
"""

import pytest

BUDGETS = {False: 12 * 60, True: 3 * 60}  # seconds of the whole command, by --short, on two cores


def pytest_addoption(parser):
    parser.addoption("--short", action="store_true", help="every bench once, in its least form")


def is_short(config) -> bool:
    return config.getoption("--short", False)  # unknown where pytest was given another folder


def pytest_configure(config):
    """pytest-benchmark's own rounds repeat what the harness has measured already."""
    config.option.benchmark_max_time = 0.2
    if is_short(config):
        config.option.benchmark_min_rounds = 1
        config.option.benchmark_max_time = 0.0
        config.option.benchmark_calibration_precision = 1
        config.option.benchmark_warmup = "off"


def pytest_collection_modifyitems(config, items):
    """--short runs the last of a bench's cases, or all if its file sets ALL_SHORT."""
    if not is_short(config):
        return
    last = {item.function: item for item in items}
    kept = [
        item
        for item in items
        if item is last[item.function] or getattr(item.module, "ALL_SHORT", False)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture
def short(request) -> bool:
    """Whether --short was given."""
    return is_short(request.config)


@pytest.fixture
def seconds(short) -> float:
    """How long the contenders of an op take turns."""
    return 0.0 if short else 0.5


def pytest_terminal_summary(terminalreporter, config):
    """Time fails nothing: on a slow machine a message says so."""
    took: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.split("::")[0]
                took[file] = took.get(file, 0.0) + report.duration
    budget, spent = BUDGETS[is_short(config)], sum(took.values())
    terminalreporter.section("seconds")
    for file, seconds in sorted(took.items(), key=lambda item: -item[1]):
        terminalreporter.line(f"{seconds:6.1f}  {file}")
    verdict = "within" if spent <= budget else "OVER"
    terminalreporter.line(f"{spent:6.1f}  in all, {verdict} the {budget} s allowed")
