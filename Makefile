# Each target works from a clean clone: it makes .venv once (again when pyproject.toml or
# constraints.txt change), installs gptfast there and runs. `make test PY=python3` instead uses an
# environment that exists, installs nothing and needs no installed gptfast: for a machine with its
# own CUDA build of torch. PYTHON is the interpreter that makes .venv (3.11 or newer).
PYTHON ?= python3

ifdef PY
RUN := $(PY)
READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
RUN := .venv/bin/python
READY := .venv/.installed
endif

.PHONY: help demo test lint bench

help:
	@echo "make demo   a story from the bundled model, with its tokens/sec"
	@echo "make test   the tests (CPU, no network)"
	@echo "make lint   style, types and the direction of imports"
	@echo "make bench  decoding speed of the bundled model"
	@echo "PY=python3 uses an existing environment instead of .venv"

demo: $(READY)
	$(RUN) scripts/generate.py --compile --prompt "Once upon a time" \
		--max-new-tokens 200 --temperature 0.8 --seed 1

test: $(READY)
	$(RUN) -m pytest

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy gptfast quantize
	$(RUN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()" --no-logo --no-cache

bench: $(READY)
	$(RUN) bench/decode.py

.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --constraint constraints.txt --editable ".[dev]"
	touch $@
