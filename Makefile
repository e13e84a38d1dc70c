# `make test` and `make bench` set up all they need in .venv, and are quick the second time. `make wheel`: dist/
#   PY=python3   use an interpreter that holds torch already; only this package is installed into it
#   BUDGET=60    seconds that a benchmark, or `make gpu`, may take; MORE=1, ONLY=abc: its other or some stages
#   TORCH=2.11.0 the torch of `make test-torch`, or `newest`
#   PYTHON=python3.12  the interpreter that its venv is made with, where there is none yet
#   SECONDS=600  that `make fuzz` takes
#   JOBS=4       processes that run the tests; 1 needs no pytest-xdist

# A GPU machine has a python3 that holds torch, and no .venv.
ifeq ($(PY)$(wildcard .venv/bin/python)$(filter-out gpu,$(MAKECMDGOALS)),)
  PY := $(shell python3 -c \
    'import importlib.util as u; u.find_spec("torch") and print("python3")' 2>/dev/null)
endif

ifdef PY
  python := $(PY)
  name := $(shell $(PY) -c 'import sys, importlib.metadata as m; \
    print(sys.prefix.replace("/", "_") + "-torch" + m.version("torch"))' 2>/dev/null)
  ifeq ($(name),)
    $(error $(PY) holds no torch: install it there, or leave PY out and .venv is made)
  endif
else
  python := .venv/bin/python
  name := .venv
  venv := .venv/ready
  # The build finds ninja on the path.
  export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif
ready := build/ready-$(name)

TORCH ?= 2.11.0
other := .venv-torch-$(TORCH)
tree := build/torch-$(TORCH)/tree

# More processes than eight wait for memory, each with a torch of its own.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
# A process that is done takes from the others' share: 10 minutes on two cores where a fixed one takes 14.
pytest = $(python) -m pytest -q $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist worksteal)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# Where cores are shared, threads that spin as they wait make 16 ms of an op of 0.3 ms.
export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE ?= 1

# Where a part of csrc that cannot be built is an error, and not left out.
test-all gpu-test gpu-bench: export ELECTRA_FAST_BUILD := strict

.PHONY: test test-all test-torch other-tree fuzz bench wheel gpu gpu-pack gpu-rehearse gpu-test gpu-bench lint clean

test: $(ready)
	$(pytest)

test-all: $(ready)
	$(pytest) -m ""
ifndef PY
	$(MAKE) test-torch TORCH=2.11.0
	$(MAKE) test-torch TORCH=newest
endif

# The tests beside the CUDA build of another torch, in a venv of its own. csrc/cuda is compiled by the nvcc
# of that venv, so that no CUDA toolkit is needed. A copy of the tree is built and tested: in place it would
# overwrite electra_fast/_C*.so of .venv.
test-torch gpu-pack: python = $(CURDIR)/$(other)/bin/python
in_tree = cd $(tree) && export PATH="$(CURDIR)/$(other)/bin:$$PATH" CUDA_VISIBLE_DEVICES= TORCH_CUDA_ARCH_LIST=9.0 \
  ELECTRA_FAST_BUILD=strict \
  CUDA_HOME=$$(echo $(CURDIR)/$(other)/lib/python3*/site-packages/nvidia/cu[0-9]*) &&

other-tree: python = $(CURDIR)/$(other)/bin/python
other-tree: $(other)/ready
	@mkdir -p $(tree) && find $(tree) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	@git ls-files -co --exclude-standard | tar -c --ignore-failed-read -T - | tar -x -C $(tree)
	$(in_tree) $(python) -m pip install -q --no-index --no-deps --no-build-isolation -e . && $(python) -m electra_fast info

test-torch: other-tree
	$(in_tree) $(pytest)

# What can be made for a GPU machine without one. TORCH and PYTHON are those of the GPU machine.
gpu-pack: other-tree
	$(in_tree) $(python) -m benchmarks.gpu.pack --out "$(CURDIR)/build/gpu-pack" \
	  --commit "$$(git -C "$(CURDIR)" rev-parse HEAD)" $$(git -C "$(CURDIR)" diff --quiet HEAD || echo --dirty)

# All evidence from a few minutes on a GPU (BUDGET=480), and the same without one. With PY nothing is installed:
# the command takes the pack's extension or builds it, and maps kernels/ to electra_fast.kernels.
gpu: $(venv) $(if $(PY),,$(ready))
	$(python) -m benchmarks gpu $(if $(BUDGET),--budget $(BUDGET)) $(if $(MORE),--more) $(if $(ONLY),--only $(ONLY))

gpu-rehearse: $(ready)
	$(python) -m benchmarks gpu --rehearse $(if $(BUDGET),--budget $(BUDGET))

# Random calls of every op by every implementation, csrc/cuda on the CPU included, against the reference.
fuzz: $(ready)
	$(python) -m electra_fast.testing.fuzz --seconds $(or $(SECONDS),600)

bench: $(ready)
	$(python) -m benchmarks $(if $(BUDGET),--budget $(BUDGET))

wheel: $(venv)
	$(python) -m pip wheel -q --no-index --no-deps --no-build-isolation -w dist .
	@ls -t dist/*.whl | head -1

# The suite and the benchmark run on a GPU where there is one. These two refuse to run without, and
# compile csrc/cuda for that GPU alone.
capability := import sys, torch; \
  torch.cuda.is_available() or sys.exit("$(python) sees no GPU; without one: make test, make bench"); \
  print("%d.%d" % torch.cuda.get_device_capability())

gpu-test gpu-bench: $(venv)
	@arch=$$($(python) -c '$(capability)') && $(MAKE) --no-print-directory $(@:gpu-%=%) \
	  TORCH_CUDA_ARCH_LIST=$$arch BUDGET=$(or $(BUDGET),480)

lint: $(venv)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	find csrc tests/host -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs clang-format --dry-run --Werror

clean:
	rm -rf build dist *.egg-info electra_fast/_C*.so electra_fast/_left_out.json

# electra_fast/_C*.so is one file, whichever interpreter and torch it was built for: a build takes
# away the stamps of the others. A folder's time tells of files added and removed.
$(ready): setup.py pyproject.toml $(shell find csrc) $(venv)
	$(python) -m pip install -q --no-index --no-deps --no-build-isolation -e .
	@mkdir -p build && rm -f build/ready-* && touch $@
	@$(python) -m electra_fast info

# Debian's python3 comes without ensurepip and leaves half a .venv behind: look before, and clear it.
first_python = $(firstword $(foreach p,$(1),$(shell \
  $(p) -c 'import ensurepip, sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
base = $(call first_python,python3 python3.14 python3.13 python3.12 python3.11)
no_base := no Python 3.11 or newer with venv here (Debian, Ubuntu: apt install python3-venv)
no_venv := $(no_base); or name an interpreter that holds torch: make $(MAKECMDGOALS) PY=python3

.venv/ready: requirements.txt
	@test -x .venv/bin/pip || rm -rf .venv
	@test -x .venv/bin/pip || test -n "$(base)" || { echo "$(no_venv)" >&2; exit 1; }
	@test -x .venv/bin/pip || $(base) -m venv .venv
	.venv/bin/python -m pip install -q --no-compile -r requirements.txt
	@touch $@

# Torch decides on the versions of triton, setuptools and CUDA's wheels. torch 2.11.0 is tested beside
# transformers 5.17.0, as they came installed together on the GPU machines that were tried.
PYTHON ?= $(call first_python,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) python3.11 python3.13 python3)
unpinned := /^(torch|triton)==/d; s/^setuptools==\S+/setuptools>=77/; s/^(cuda-toolkit\S*)==[0-9.]+/\1/
unpinned += $(if $(filter 2.11.0,$(TORCH)),; s/^transformers==\S+/transformers==5.17.0/)
is_cuda := import sys, torch; torch.version.cuda or sys.exit("test-torch: TORCH must be a CUDA build, got " \
  + torch.__version__ + "; see where pip is told to look for wheels: pip config list")

.venv-torch-%/ready: requirements.txt
	@test -x $(@D)/bin/pip || test -n "$(PYTHON)" || { echo "$(no_base)" >&2; exit 1; }
	@test -x $(@D)/bin/pip || $(PYTHON) -m venv --clear $(@D)
	@echo "$(@D): 5 GB of packages and 2 minutes to compile; the tests then take as long as those of make test"
	$(@D)/bin/python -m pip install -q --no-compile -U torch$(if $(filter-out newest,$*),==$*)
	@$(@D)/bin/python -W ignore -c '$(is_cuda)'
	sed -E '$(unpinned)' requirements.txt > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install -q --no-compile -r $(@D)/requirements.txt
	@touch $@
