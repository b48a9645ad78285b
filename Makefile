.PHONY: install test fuzz settings bench report gpu-check gpu-report lint clean

CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

install:
	pip install -c constraints.txt -e '.[train,test]'

test:
	pytest -n 2 --dist worksteal

# Thousands of random command lines, files, networks and arguments (tests/fuzz/fuzz.py); hours.
fuzz:
	OMP_NUM_THREADS=1 python tests/fuzz/fuzz.py all --cases 10000 --seed 1
	OMP_NUM_THREADS=1 python tests/fuzz/fuzz_media.py --cases 10000 --seed 1

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

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info *.so .pytest_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
