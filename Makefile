# Everything from a machine with Python, pip and a C++ compiler: `make demo`, or `make test`.
# A CUDA machine asks for its own torch:  make venv TORCH=torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The one that this torch is made for; a torch for CUDA brings its own.
TRITON ?= triton==3.7.1
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TYPETREE := build/typecheck

SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl)
NATIVE_SOURCES := $(wildcard tests/native/*.cpp tests/native/*.h)
LINTED := setup.py moert kernels predictors tests $(wildcard bench)

NATIVE := $(MAKE) --no-print-directory -j$(shell nproc) -f tests/native/native.mk
AARCH64_CXX ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64-static

# Processes that share the tests.
WORKERS ?= auto

# Options of bench/kernel_check.py, as --quick.
KERNEL_CHECK ?=

comma := ,
# address looks at the native checks and at the tests of the extension, thread at the native checks alone.
SANITIZER ?= address
SANITIZED := build/sanitize-$(SANITIZER)
SANITIZE_FLAGS := -g1 -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all \
    -fsanitize=$(if $(filter thread,$(SANITIZER)),thread,address$(comma)undefined)
SANITIZED_TESTS ?= $(wildcard tests/test_kernels_*.py tests/test_pool.py tests/test_tiers_native.py)

.PHONY: help venv demo test test-slow check kernels docs format clean native-check aarch64-check sanitize sanitize-python

help:
	@echo "make venv   set up $(VENV) with all that the demo, the tests and the benchmarks need"
	@echo "make demo   venv, then the demo"
	@echo "make test   venv, then the tests (test-slow: the long ones)"
	@echo "make check  lint, format, types"
	@echo "make kernels        compile the Triton kernels for every GPU architecture, none needed"
	@echo "make native-check   checks of csrc/ in C++ (aarch64-check: the same for aarch64, emulated)"
	@echo "make sanitize       those and the tests of csrc/ with a sanitiser; SANITIZER=thread: data races"
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
	$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch")); \
	    print(*[f"triton=={d.version}" for d in m.distributions(name="triton")] or ["$(TRITON)"])' > $(VENV)/constraints.txt
	$(PIP) install --no-build-isolation -c $(VENV)/constraints.txt -e ".[test,dev]"
	touch $@

demo: venv
	$(BIN)/moert demo

test: venv
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-slow: venv
	$(BIN)/python -m pytest -m slow

check: venv
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	rm -rf $(TYPETREE) && mkdir -p $(TYPETREE)/moert
	ln -s $(addprefix $(CURDIR)/,$(wildcard moert/*) kernels predictors) $(TYPETREE)/moert/
	cd $(TYPETREE) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p moert
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(NATIVE_SOURCES)

kernels: venv
	$(BIN)/python bench/kernel_check.py $(KERNEL_CHECK)

native-check:
	$(NATIVE) BUILD=build/native run

# One processor with the products of int8 and one without.
aarch64-check:
	@if command -v $(AARCH64_CXX) > /dev/null && command -v $(QEMU) > /dev/null; then \
	    for cpu in max cortex-a53; do \
	        $(NATIVE) BUILD=build/aarch64 CXX=$(AARCH64_CXX) LINK=-static RUN="$(QEMU) -cpu $$cpu" run || exit 1; \
	    done; \
	else \
	    echo "SKIPPED: aarch64-check needs $(AARCH64_CXX) and $(QEMU)" \
	        "(on Debian: apt install g++-aarch64-linux-gnu qemu-user-static)"; \
	fi

sanitize:
	$(NATIVE) BUILD=$(SANITIZED) FLAGS="$(SANITIZE_FLAGS)" run
	$(if $(filter address,$(SANITIZER)),$(MAKE) --no-print-directory sanitize-python)

# In the folder of the sanitised package, so that it is imported and not the one here. Without the tests that fork: the
# sanitiser's own locks may be taken by another thread at that moment, and then the child hangs in free().
sanitize-python: EXTENSION := $(CURDIR)/$(SANITIZED)/package/moert/_C.abi3.so
sanitize-python: venv
	$(NATIVE) BUILD=$(SANITIZED) FLAGS="$(SANITIZE_FLAGS)" PYTHON=$(CURDIR)/$(BIN)/python \
	    $(SANITIZED)/package/moert/_C.abi3.so
	cd $(SANITIZED)/package && \
	    LD_PRELOAD="$(foreach name,libasan.so libubsan.so,$(shell $(CXX) -print-file-name=$(name)))" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(CURDIR)/tests/native MOERT_EXTENSION=$(EXTENSION) \
	    $(CURDIR)/$(BIN)/python -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -p extension_in_use \
	    -p no:cacheprovider --capture=sys -k "not fork" $(addprefix $(CURDIR)/,$(SANITIZED_TESTS))

docs: venv
	PYTHONPATH=tests $(BIN)/python -m families.document docs/families.md

format: venv
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(SOURCES) $(NATIVE_SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis moert/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
