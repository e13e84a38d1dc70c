# `make test` and `make bench` set up all they need in .venv, and are quick the second time.
#   PY=python3   use an interpreter that holds torch already; only this package is installed into it
#   BUDGET=60    seconds that a benchmark may take
#   JOBS=4       processes that run the tests; 1 needs no pytest-xdist

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

# More processes than eight wait for memory, each with a torch of its own.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
# A process that is done takes from the others' share: 10 minutes on two cores where a fixed one takes 14.
pytest = $(python) -m pytest -q $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist worksteal)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# Where cores are shared, threads that spin as they wait make 16 ms of an op of 0.3 ms.
export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE ?= 1

.PHONY: test test-all bench gpu-test gpu-bench lint clean

test: $(ready)
	$(pytest)

test-all: $(ready)
	$(pytest) -m ""

bench: $(ready)
	$(python) -m benchmarks $(if $(BUDGET),--budget $(BUDGET))

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
	rm -rf build dist *.egg-info electra_fast/_C*.so

# electra_fast/_C*.so is one file, whichever interpreter and torch it was built for: a build takes
# away the stamps of the others. A folder's time tells of files added and removed.
$(ready): setup.py pyproject.toml $(shell find csrc) $(venv)
	$(python) -m pip install -q --no-index --no-deps --no-build-isolation -e .
	@mkdir -p build && rm -f build/ready-* && touch $@
	@$(python) -m electra_fast info

# Debian's python3 comes without ensurepip and leaves half a .venv behind: look before, and clear it.
base = $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
  $(p) -c 'import ensurepip, sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
no_base := no Python 3.11 or newer with venv here (Debian, Ubuntu: apt install python3-venv); \
  or name an interpreter that holds torch: make $(MAKECMDGOALS) PY=python3

.venv/ready: requirements.txt
	@test -x .venv/bin/pip || rm -rf .venv
	@test -x .venv/bin/pip || test -n "$(base)" || { echo "$(no_base)" >&2; exit 1; }
	@test -x .venv/bin/pip || $(base) -m venv .venv
	.venv/bin/python -m pip install -q --no-compile -r requirements.txt
	@touch $@
