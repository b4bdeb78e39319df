PYTHON ?= python

.PHONY: test slow faults lint smoke

test:  ## the default tests
	$(PYTHON) -m pytest

slow:  ## the tests that take longer, in all most of an hour
	$(PYTHON) -m pytest -m slow

faults:  ## damaged checkpoints, deaths, full disks: ten times the trials of the other tests
	JAXFLAT_FAULT_TRIALS=60 $(PYTHON) -m pytest tests/faults -m "slow or not slow"

lint:  ## style and types
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check
	shellcheck launch/*.sh launch/slurm.sbatch .ci/run
	$(PYTHON) -m pyright --pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

smoke:  ## the main job in under a minute
	$(PYTHON) -m jaxflat.main --config=configs/model_size_sweep.py:smoke --workdir=runs/smoke
