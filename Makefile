# Everything from a machine with Python, pip and a C++ compiler: `make demo`, or `make test`.
# A CUDA machine asks for its own torch:  make venv TORCH=torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TYPETREE := build/typecheck

SOURCES := $(wildcard csrc/*.cpp csrc/*.h)
LINTED := setup.py moert kernels predictors tests $(wildcard bench)

.PHONY: help venv demo test test-slow check docs format clean

help:
	@echo "make venv   set up $(VENV) with all that the demo, the tests and the benchmarks need"
	@echo "make demo   venv, then the demo"
	@echo "make test   venv, then the tests (test-slow: the long ones)"
	@echo "make check  lint, format, types"
	@echo "make docs   write docs/families.md anew"
	@echo "make format rewrite sources in the project's style"
	@echo "make clean  remove what the build made"

venv: $(VENV)/.installed

# Some distributions ship Python without ensurepip; the pip at hand then fills the new environment.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) \
	    && $(PYTHON) -m pip --python $(VENV)/bin/python install pip; }

# torch comes first and alone: resolved together with the rest, a plain `torch` may be a CUDA build of gigabytes.
$(VENV)/.torch: | $(VENV)/bin/python
	$(PIP) install "$(TORCH)"
	$(PIP) install "setuptools>=77" wheel
	touch $@

$(VENV)/.installed: pyproject.toml setup.py $(SOURCES) | $(VENV)/.torch
	$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(VENV)/constraints.txt
	$(PIP) install --no-build-isolation -c $(VENV)/constraints.txt -e ".[test,dev]"
	touch $@

demo: venv
	$(BIN)/moert demo

test: venv
	$(BIN)/python -m pytest

test-slow: venv
	$(BIN)/python -m pytest -m slow

check: venv
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	rm -rf $(TYPETREE) && mkdir -p $(TYPETREE)/moert
	ln -s $(addprefix $(CURDIR)/,$(wildcard moert/*) kernels predictors) $(TYPETREE)/moert/
	cd $(TYPETREE) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p moert
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

docs: venv
	PYTHONPATH=tests $(BIN)/python -m families.document docs/families.md

format: venv
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis moert/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
