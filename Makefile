# `make test` and `make bench` install everything they need into .venv; CONTRIBUTING.md lists the targets.
#   PY=python3   use an interpreter that has torch; only this package is installed into it
#   BUDGET=60    seconds of a benchmark, of `make gpu` or of `make gpu-learn`
#   MORE=1, ONLY=abc  other or some stages of `make gpu`; MORE=1: the second command of `make gpu-learn`
#   TORCH=2.11.0 the torch of `make test-torch`, or `newest`
#   PYTHON=python3.12  the interpreter that makes the venv of `make test-torch`, if it does not exist
#   SECONDS=600  duration of `make fuzz`
#   JOBS=4       processes that run the tests; 1 needs no pytest-xdist

# A GPU machine has a python3 with torch, and no .venv.
ifeq ($(PY)$(wildcard .venv/bin/python)$(filter-out gpu gpu-learn,$(MAKECMDGOALS)),)
  PY := $(shell python3 -c \
    'import importlib.util as u; u.find_spec("torch") and print("python3")' 2>/dev/null)
endif

ifdef PY
  python := $(PY)
  name := $(shell $(PY) -c 'import sys, importlib.metadata as m; \
    print(sys.prefix.replace("/", "_") + "-torch" + m.version("torch"))' 2>/dev/null)
  ifeq ($(name),)
    $(error $(PY) must have torch; install torch there, or omit PY to make .venv)
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

# Each process imports its own torch, so more than eight wait for memory.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
# With `worksteal`, a process that has finished runs tests of the others: 10 minutes on two cores instead of 14.
pytest = $(python) -m pytest -q $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist worksteal)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# On shared cores, threads that spin while they wait turn an op of 0.3 ms into 16 ms.
export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE ?= 1
# Some machines set this variable; then each of the hundred processes of the tests compiles PyTorch's sources again,
# for 1 to 4 seconds.
export PYTHONDONTWRITEBYTECODE :=

# For these targets, a part of csrc that cannot be built is an error.
test-all gpu-test gpu-bench: export ELECTRA_FAST_BUILD := strict

.PHONY: test test-all test-torch other-tree fuzz bench wheel gpu gpu-pack gpu-rehearse gpu-learn gpu-learn-pack \
  gpu-learn-rehearse gpu-test gpu-bench lint words clean

test: $(ready)
	$(pytest)

test-all: $(ready)
	$(pytest) -m "" --seed=random
ifndef PY
	$(MAKE) test-torch TORCH=2.11.0
	$(MAKE) test-torch TORCH=newest
endif

# The tests with the CUDA build of another torch, in a separate venv. The nvcc of that venv compiles csrc/cuda,
# so no CUDA toolkit is needed. A copy of the tree is built and tested, because a build in place would
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

# Build, without a GPU, what a GPU machine needs. TORCH and PYTHON are those of the GPU machine.
gpu-pack: other-tree
	$(in_tree) $(python) -m benchmarks.gpu.pack --out "$(CURDIR)/build/gpu-pack" \
	  --commit "$$(git -C "$(CURDIR)" rev-parse HEAD)" $$(git -C "$(CURDIR)" diff --quiet HEAD || echo --dirty)

# Check and measure everything in a few minutes on a GPU (BUDGET=480), or rehearse that without one. With PY
# nothing is installed: the command uses the extension of the pack or builds it, and links kernels/ to
# electra_fast.kernels.
gpu: $(venv) $(if $(PY),,$(ready))
	$(python) -m benchmarks gpu $(if $(BUDGET),--budget $(BUDGET)) $(if $(MORE),--more) $(if $(ONLY),--only $(ONLY))

gpu-rehearse: $(ready)
	$(python) -m benchmarks gpu --rehearse $(if $(BUDGET),--budget $(BUDGET))

# Train ELECTRA on a GPU, then with MORE=1 a masked language model with the same FLOPs, in 8 minutes each. Before
# that, copy the text and the tasks from DATA without a GPU.
gpu-learn: $(venv) $(if $(PY),,$(ready))
	$(python) -m benchmarks.learning.on_gpu $(if $(BUDGET),--budget $(BUDGET)) $(if $(MORE),--more)

gpu-learn-pack: $(ready)
	$(python) -m benchmarks.learning.on_gpu --pack "$(or $(DATA),$(error gpu-learn-pack: name the folder, DATA=folder))"

gpu-learn-rehearse: $(ready)
	$(python) -m benchmarks.learning.on_gpu --rehearse

# Compare every implementation of every op with the reference in random calls; csrc/cuda runs on the CPU.
fuzz: $(ready)
	$(python) -m electra_fast.testing.fuzz --seconds $(or $(SECONDS),600)

bench: $(ready)
	$(python) -m benchmarks $(if $(BUDGET),--budget $(BUDGET))

wheel: $(venv)
	$(python) -m pip wheel -q --no-index --no-deps --no-build-isolation -w dist .
	@ls -t dist/*.whl | head -1

# `make test` and `make bench` use a GPU if there is one. These two need one, and compile csrc/cuda only for it.
capability := import sys, torch; \
  torch.cuda.is_available() or sys.exit("$(python) sees no GPU; use make test or make bench without one"); \
  print("%d.%d" % torch.cuda.get_device_capability())

gpu-test gpu-bench: $(venv)
	@arch=$$($(python) -c '$(capability)') && $(MAKE) --no-print-directory $(@:gpu-%=%) \
	  TORCH_CUDA_ARCH_LIST=$$arch BUDGET=$(or $(BUDGET),480)

lint: $(venv)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	find csrc tests/host -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs clang-format --dry-run --Werror
	$(MAKE) --no-print-directory words

# Find the words that CONTRIBUTING.md asks to avoid. `git grep` ends with status 1 if there is none.
words:
	@git grep --untracked -nwiEf .lint-words -- '*.py' '*.md' '*.cpp' '*.h' '*.cu' '*.cuh' '*.c' Makefile ':!CONTRIBUTING.md'; \
	  test $$? -eq 1 || { echo "replace these words: see CONTRIBUTING.md, Language" >&2; exit 1; }

clean:
	rm -rf build dist *.egg-info electra_fast/_C*.so electra_fast/_left_out.json

# There is one electra_fast/_C*.so for all interpreters and torches, so a build removes the stamps of the
# others. The time of a folder changes when a file in it is added or removed.
$(ready): setup.py pyproject.toml $(shell find csrc) $(venv)
	$(python) -m pip install -q --no-index --no-deps --no-build-isolation -e .
	@mkdir -p build && rm -f build/ready-* && touch $@
	@$(python) -m electra_fast info

# Debian's python3 has no ensurepip and would leave half a .venv. So look for ensurepip first, and remove the half.
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

# Torch determines the versions of triton, setuptools and CUDA's wheels. torch 2.11.0 is tested with
# transformers 5.17.0, because the GPU machines that were tried had both.
PYTHON ?= $(call first_python,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) python3.11 python3.13 python3)
unpinned := /^(torch|triton)==/d; s/^setuptools==\S+/setuptools>=77/; s/^(cuda-toolkit\S*)==[0-9.]+/\1/
unpinned += $(if $(filter 2.11.0,$(TORCH)),; s/^transformers==\S+/transformers==5.17.0/)
is_cuda := import sys, torch; torch.version.cuda or sys.exit("test-torch: TORCH must be a CUDA build, got " \
  + torch.__version__ + "; `pip config list` shows the index of pip")

.venv-torch-%/ready: requirements.txt
	@test -x $(@D)/bin/pip || test -n "$(PYTHON)" || { echo "$(no_base)" >&2; exit 1; }
	@test -x $(@D)/bin/pip || $(PYTHON) -m venv --clear $(@D)
	@echo "$(@D): 5 GB of packages and 2 minutes to compile; the tests then need as long as those of make test"
	$(@D)/bin/python -m pip install -q --no-compile -U torch$(if $(filter-out newest,$*),==$*)
	@$(@D)/bin/python -W ignore -c '$(is_cuda)'
	sed -E '$(unpinned)' requirements.txt > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install -q --no-compile -r $(@D)/requirements.txt
	@touch $@
