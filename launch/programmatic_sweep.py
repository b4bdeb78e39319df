"""Run a sweep from Python: like the command, but code makes the points.

    python launch/programmatic_sweep.py runs/grammar_seeds

Trains one size of transformer on three balanced-tree grammars, and prints the results.
"""

import sys
from pathlib import Path

from jaxflat import config as base_config
from jaxflat.config import param
from jaxflat.distributed.sharding import set_up_devices
from jaxflat.main import show_report
from jaxflat.sweeps import sweep


def main(workdir: Path) -> int:
    """Run the sweep; return 3 if some points failed, else 0."""
    config = base_config.base()
    config.language.name = "balanced_tree"
    config.phases.pretrain.steps = 1000
    config.phases.pretrain.checkpoint_steps = (1000,)
    failures = sweep.run(config, param("language.seed", [1, 2, 3]), workdir)
    show_report(workdir)
    return 3 if failures else 0


if __name__ == "__main__":
    set_up_devices()
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/grammar_seeds")))
