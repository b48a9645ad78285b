.PHONY: install test bench lint clean

CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

install:
	pip install -c constraints.txt -e '.[train,test]'

test:
	pytest

bench:
	pytest benchmarks/ --benchmark-only

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info *.so .pytest_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
