# make demo   forget a concept in the bundled model and open a report
# make test   the whole test suite          make lint   ruff          make bench   CPU benchmarks
# make asan   the tests of masks, files and kernels with the CPU kernels built for AddressSanitizer (needs gcc)
# TORCH=... chooses the torch requirement to install, e.g. make test TORCH='torch==2.12.*'

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUANTISED := $(VENV)/quantised
QUANTISED_TESTS := tests/fade/test_quantised.py
EXTENSION := setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

.PHONY: demo test asan lint bench setup clean

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

# A process for each core, each with one thread: threads that wait for one another cost more than they bring on tensors
# as small as the tests'.
test: $(READY) $(QUANTISED)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal --ignore $(QUANTISED_TESTS)
	OMP_NUM_THREADS=1 PYTHONPATH=$(QUANTISED) $(BIN)/python -m pytest -q -n auto $(QUANTISED_TESTS)

# The libraries of quantised bases lie apart and are there for their own tests alone: diffusers and PEFT import whatever
# of them they find, three seconds in every process.
$(QUANTISED)/.ready: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(QUANTISED) \
		"bitsandbytes>=0.49" "torchao>=0.17" "gguf>=0.17" "optimum-quanto>=0.2.7"
	@touch $@

# In a folder of its own, with copies of what it runs, so that nothing takes the ordinary extension for this one or the
# other way round. libstdc++ is loaded first, too, or the sanitizer does not find what throws exceptions.
ASAN := build/asan
ASAN_TESTS := $(addprefix tests/,fuzz fade/test_adapter_file.py $(patsubst %,fade_kernels/test_%.py,bitmask masked_lora \
	masked_lora_backward masked_lora_conv2d stochastic_rounding select_top_fraction gradient_magnitude positions least_squares))

asan: $(READY)
	FADE_SANITIZE=address,undefined FADE_CUDA=0 FADE_REQUIRE_EXT=1 $(BIN)/python setup.py -q build_ext \
		--build-lib $(ASAN) --build-temp $(ASAN)/objects
	rm -rf $(ASAN)/fade $(ASAN)/tests $(addprefix $(ASAN)/fade_kernels/,_ops cuda triton_kernels)
	cp -R fade tests pyproject.toml $(ASAN)
	cp -R fade_kernels/*.py fade_kernels/_ops fade_kernels/cuda fade_kernels/triton_kernels $(ASAN)/fade_kernels
	preload="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" && cd $(ASAN) && \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$$preload" \
		$(abspath $(BIN))/python -m pytest -q --capture=sys -p no:cacheprovider $(ASAN_TESTS) -k "not (compile or opcheck or test_memory)"

lint: $(READY)
	$(BIN)/ruff check .

bench: $(READY)
	$(BIN)/python -m bench --device cpu --output bench/results/cpu.json
	$(BIN)/python -m bench.bench_stages

clean:
	rm -rf build dist *.egg-info fade_kernels/*.so demo-report
