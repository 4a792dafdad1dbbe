# One command runs the main job, one passes the tests; each sets up its own virtual environment.
VENV ?= .venv
PYTHON ?= python3

.PHONY: demo test lint types docs clean

demo: $(VENV)/base
	$(VENV)/bin/trace-sdk detect examples/photos/cars.jpg --overlay -o out

test: $(VENV)/dev
	$(VENV)/bin/pytest

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy does not follow package-dir, so it reads the package as it is installed: export/ inside trace_sdk/.
types: $(VENV)/dev
	rm -rf build
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	cd build/types && $(abspath $(VENV))/bin/mypy --config-file ../../pyproject.toml -p trace_sdk

# A site of docs/, docstrings and --help texts; a link that leads nowhere is an error.
docs: $(VENV)/dev
	$(VENV)/bin/sphinx-build --quiet --fail-on-warning --keep-going -c docs . build/docs
	@echo "build/docs/docs/index.html"

$(VENV)/base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf .venv out runs build *.egg-info
