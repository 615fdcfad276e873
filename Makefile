# make demo        everything from download to a report, on a real model
# make test        lint, types and the test suite
# make slow-test   the tests that need minutes or a real model
# make lint        ruff and mypy alone
# make gpu-check   on a machine with a CUDA device: the tests that need one, and a table of times, in .venv-gpu
# make test-native the kernels without ONNX Runtime, plain and under sanitizers (cmake and a C++ compiler)
# make clean       remove the environment, builds, caches and what the demo wrote
#
# PYTHON=python3.12   the interpreter to make the environment from
# PIP_ARGS=...        extra arguments for pip install, e.g. an index that has the CPU build of torch
# TEST_ARGS=...       extra arguments for pytest, e.g. tests/onnx
# CUDA_ARCHITECTURES="80;90"  compute capabilities to compile the CUDA kernels for, where there is an nvcc; "" for all. A
#                     minute each; other devices compile them when they first load them.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TEST_ARGS ?=
CUDA_ARCHITECTURES ?= 80

bin := $(VENV)/bin
sources := pyproject.toml constraints.txt CMakeLists.txt $(wildcard mla_pass/native/*.cc mla_pass/native/*.h mla_pass/native/*.txt mla_pass/native/cuda/*.*)
pip := $(bin)/python -m pip --disable-pip-version-check --quiet
install := install $(PIP_ARGS) -c constraints.txt -C "cmake.define.MLA_PASS_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)"
pytest := $(bin)/python -m pytest --timeout=300

.PHONY: demo test slow-test test-native gpu-check gpu-here lint typecheck clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(bin)/python demo/run.py

test: lint
	$(pytest) -m "not slow and not gpu" $(TEST_ARGS)

slow-test: $(VENV)/.installed-test
	$(bin)/python -m pytest --timeout=3600 -m "slow and not gpu" $(TEST_ARGS)

lint: $(VENV)/.installed-test typecheck
	$(bin)/ruff check .

# Plain for the optimised code; address and undefined behaviour; data races, both with the kernels for bfloat16 emulated.
# SECONDS of random nodes each.
NATIVE_SECONDS ?= 20
sanitized := plain address,undefined thread

test-native: $(foreach kind,$(sanitized),build/driver-$(kind)/.passed)

build/driver-%/.passed: FORCE
	cmake -S . -B $(@D) -DMLA_PASS_NATIVE=ON -DMLA_PASS_CUDA=OFF -DMLA_PASS_DRIVER=ON \
	  -DMLA_PASS_SANITIZE=$(filter-out plain,$*) -DMLA_PASS_EMULATE=$(if $(filter plain,$*),OFF,ON) > /dev/null
	cmake --build $(@D) --target mla_pass_driver
	$(@D)/mla_pass/native/mla_pass_driver $(NATIVE_SECONDS)

.PHONY: FORCE
FORCE:

# mypy reads folders, not import hooks: show it the packages where they install.
typecheck: $(VENV)/.installed-test
	rm -rf build/typecheck
	mkdir -p build/typecheck/mla_pass
	ln -s $(CURDIR)/mla_pass/* $(CURDIR)/patterns $(CURDIR)/export build/typecheck/mla_pass/
	ln -s $(CURDIR)/mla_retrofit build/typecheck/
	cd build/typecheck && $(abspath $(bin))/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p mla_pass -p mla_retrofit

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit("mla_pass needs Python 3.11 or later: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(sources) | $(bin)/python
	$(pip) $(install) -e ".[cpu,torch]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(pip) $(install) -e ".[cpu,torch,genai,plot,test]"
	touch $@

# onnxruntime-gpu and onnxruntime cannot share an environment, nor can builds of torch. The compiler comes first: the
# library takes the nvcc of the environment that it is built in, and compiles for this machine's device alone.
GPU_VENV ?= .venv-gpu
gpu := $(GPU_VENV)/bin/python
cuda_build := $(PYTHON) -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*extras["cuda-build"])'

gpu-check: $(GPU_VENV)/.installed
	$(gpu) -m pytest --timeout=1800 -m gpu $(TEST_ARGS)
	$(gpu) -m benchmarks.gpu_decode --markdown build/gpu_decode.md
	@echo "the table is in build/gpu_decode.md"

gpu-here:
	@$(PYTHON) benchmarks/gpu_here.py > /dev/null

$(GPU_VENV)/.installed: $(sources) | gpu-here
	$(PYTHON) -m venv $(GPU_VENV)
	$(gpu) -m pip install --quiet $(PIP_ARGS) $$($(cuda_build))
	$(gpu) -m pip install --quiet $(PIP_ARGS) -c constraints.txt -C cmake.define.MLA_PASS_CUDA=ON \
	    -C "cmake.define.MLA_PASS_CUDA_ARCHITECTURES=$$($(PYTHON) benchmarks/gpu_here.py)" \
	    -e ".[cuda,torch,triton,test]" "onnxruntime-gpu[cuda,cudnn]"
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) build dist demo/cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
