PYTHON ?= python

.PHONY: test slow full lint smoke

test:  ## the default tests, in minutes
	$(PYTHON) -m pytest

slow:  ## the longer tests that CI runs besides
	$(PYTHON) -m pytest -m slow

full:  ## every case and every trial: all random faults, seeds, sizes and combinations; hours
	JAXFLAT_FULL=1 $(PYTHON) -m pytest -m "slow or not slow"

lint:  ## style and types
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check
	shellcheck launch/*.sh launch/slurm.sbatch .ci/run
	$(PYTHON) -m pyright --pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

smoke:  ## the main job at a tiny scale: a minute on two cores, most of it compiling
	$(PYTHON) -m jaxflat.main --config=configs/model_size_sweep.py:smoke --workdir=runs/smoke
