# make demo | test | test-triton | sanitize | lint | bench | gpu | clean.  Each makes .venv itself; PYTHON=... chooses the interpreter for it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := CMakeLists.txt $(shell find kernels -name '*.cpp' -o -name '*.hpp')

.PHONY: help install demo test test-triton sanitize lint bench gpu clean distclean

help:
	@sed -n 1p Makefile | cut -c 3-

install: $(STAMP)

# Editable: changed Python is seen at once; changed C++ makes the stamp old, and the next target builds it again.
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) not found: libi_fast needs Python 3.11 or newer (make PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "libi_fast needs Python 3.11 or newer, and $(PYTHON) is %d.%d (make PYTHON=...)" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python -c "from libi_fast.kernels import cpu; print('compiled kernels:', cpu.why_unavailable() or cpu.isa())"
	@touch $@

demo: $(STAMP)
	$(BIN)/libi-fast demo --out demo-run --force

# Two tests at a time, but for those that compile kernels, which share two compilers themselves. Triton's interpreter is
# chosen when Triton is imported, hence a process of its own.
SIDE_BY_SIDE := -n 2 --dist worksteal
test: export OMP_WAIT_POLICY := passive
test: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --ignore tests/test_triton_compile.py $(ARGS)
	$(BIN)/python -m pytest tests/test_triton_compile.py $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/gpu $(ARGS)

# The kernels compiled, not run, by another release of Triton: make test-triton VERSION=3.6.0
OTHER := build/triton-$(VERSION)
test-triton: $(STAMP)
	@test -n "$(VERSION)" || { echo "which release of Triton? make test-triton VERSION=3.6.0"; exit 1; }
	@test -d $(OTHER)/triton-$(VERSION).dist-info || \
		$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(OTHER) triton==$(VERSION)
	@PYTHONPATH=$(OTHER) $(BIN)/python -c 'import triton; found = triton.__version__; assert found == "$(VERSION)", f"this is Triton {found}"'
	@PYTHONPATH=$(OTHER) $(BIN)/python -m pytest -q tests/test_triton_compile.py $(ARGS)

# The C++ kernels, first with AddressSanitizer and UndefinedBehaviorSanitizer, then with ThreadSanitizer: random calls
# (make sanitize FUZZ="--seconds 600 --seed 7"), then their tests. Leaks are looked for in the calls, not in Python.
FUZZ := --seconds 60
PRELOAD_address := libasan.so libstdc++.so
PRELOAD_thread := libtsan.so
export ASAN_OPTIONS := detect_leaks=0 allocator_may_return_null=1
export TSAN_OPTIONS := allocator_may_return_null=1 ignore_noninstrumented_modules=1 halt_on_error=1
sanitize: sanitize-address sanitize-thread

sanitize-%: $(STAMP)
	@command -v cmake > /dev/null || { echo "make sanitize needs cmake and GCC with its sanitizers (Debian: apt-get install cmake g++)"; exit 1; }
	@rm -f build/sanitize/$*/CMakeCache.txt  # which another compiler would clear of our options half-way
	@cmake -S . -B build/sanitize/$* -DLIBI_SANITIZE=$* -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_COMPILER=$(CXX) > /dev/null
	@cmake --build build/sanitize/$* --parallel 2 --target libi_fuzz libi_kernels
	env -u ASAN_OPTIONS -u TSAN_OPTIONS build/sanitize/$*/libi_fuzz $(FUZZ)
	LD_PRELOAD="$(foreach name,$(PRELOAD_$*),$(shell $(CXX) -print-file-name=$(name)))" LIBI_FAST_LIBRARY=build/sanitize/$*/libi_kernels.so \
		$(BIN)/python -m pytest -q --capture=sys -m "not slow" tests/test_native_*.py $(ARGS)

# Type checkers do not follow an editable install, and the kernels are a folder elsewhere until installed: mypy reads
# a copy laid out as installed. It is made anew each time, so that no deleted file lingers.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typecheck && mkdir -p build/typecheck
	@cp -R libi_fast build/typecheck/libi_fast && cp -R kernels build/typecheck/libi_fast/kernels
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p libi_fast

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

# Everything that needs a GPU, in pieces that fit the time (README); with the system's Python, whose torch knows the GPU.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf build dist demo-run .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find kernels libi_fast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2> /dev/null || true

distclean: clean
	rm -rf $(VENV)
