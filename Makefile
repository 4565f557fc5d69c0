# The README's two commands, for those who have make.
train:
	python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt . && .venv/bin/python -m jaxft.main --config=configs/t5.py

test:
	python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ".[dev]" && .venv/bin/python -m pytest

lint:
	.venv/bin/ruff check . && .venv/bin/ruff format --check jaxft

.PHONY: train test lint
