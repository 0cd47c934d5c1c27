# make demo   forget a concept in the bundled model and open a report
# make test   the whole test suite          make lint   ruff          make bench   CPU benchmarks
# TORCH=... chooses the torch requirement to install, e.g. make test TORCH='torch==2.12.*'

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTENSION := setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

.PHONY: demo test lint bench setup clean

setup: $(READY)

# torch comes first and the build is not isolated: the extension is compiled against the torch that will load it.
$(READY): pyproject.toml $(EXTENSION)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "FADE needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)" "setuptools>=77" wheel ninja "pybind11>=2.13" packaging
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[demo,test,lint]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/fade demo --output demo-report --overwrite

test: $(READY)
	$(BIN)/python -m pytest -q

lint: $(READY)
	$(BIN)/ruff check .

bench: $(READY)
	$(BIN)/python -m bench --device cpu --output bench/results/cpu.json
	$(BIN)/python -m bench.bench_stages

clean:
	rm -rf build dist *.egg-info fade_kernels/*.so demo-report
