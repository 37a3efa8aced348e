# What one needs every day; `.ci/run` is what every change must pass.
.PHONY: help setup test quick lint run

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## make .venv with the package, its tests and the commit hooks
	python3 -m venv .venv
	.venv/bin/pip install -e '.[dev]'
	.venv/bin/pre-commit install

test:  ## run all tests
	.venv/bin/pytest

quick:  ## run the tests of structure, documents, settings and schedules
	.venv/bin/pytest tests/test_layers.py tests/test_docs.py tests/cli tests/config tests/growth tests/system

lint:  ## check style, formatting and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

run:  ## train the demo, about two minutes
	.venv/bin/python -m jaxmorph.train --config configs/demo.yaml
