# Every target sets up what it needs first (deploy/setup.sh); that costs minutes once.

.PHONY: demo test lint format setup

demo: setup
	.venv/bin/python -m demo

test: setup
	.venv/bin/python -m pytest

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

setup:
	@deploy/setup.sh
