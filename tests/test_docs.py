"""The pages that a reader looks things up in: what they name is there, and the README is short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "vfengine/assets/README.md")
PAGES += tuple(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))
TREES = "benchmarks|csrc|docs|kernels|tests|vfengine"
BLANKS = {"<op>": "residual_step", "<x>": "unet"}  # in file names that stand for several


def read(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    for blank, name in BLANKS.items():
        text = text.replace(blank, name)
    return text


def anchors(text: str) -> set[str]:
    """Where a link may lead within a page, as GitHub names its headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_paths_are_there(page):
    paths = re.findall(rf"(?<![\w./-])(?:{TREES})/[\w./-]*\w", read(page))
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_file_names_are_those_of_a_file(page):
    """The names of files that are given without their folder, as `solvers.py`."""
    names = set(re.findall(r"`([\w.-]+\.(?:py|h|cpp|cuh?|md|toml|jsonl?))`", read(page)))
    assert {name for name in names if not any(ROOT.rglob(name))} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        file, _, anchor = target.partition("#")
        if "://" not in file:
            found = (ROOT / page).parent / file if file else ROOT / page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_goals_are_called_targets(page):
    rows = re.findall(r"^\|.*\basked\b.*$", read(page), re.MULTILINE)
    assert not rows and not re.search(r"\bwas asked\b|\bmisses .*\bmark", read(page))


def test_readme_is_short():
    assert len(read("README.md").split()) <= 900
