"""Run a sweep on Slurm, from Python by submitit: pip install -e '.[slurm]'

    python launch/submitit_sweep.py --workers=8 --minutes=480 --slurm=partition=a,gpus-per-task=1 \
        --config=configs/model_size_sweep.py:paper --workdir=/shared/sizes

Each job is a worker, which takes points that have none. An interrupted job saves its state, and
submitit requeues it. Arguments that this script does not know go to jaxflat.main.
"""

import argparse
import os
import signal
import sys

os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "TERM"  # read when submitit is imported, here and in jobs

import submitit


class Worker(submitit.helpers.Checkpointable):
    """A process of jaxflat.main; submitit requeues it with the same arguments."""

    def __call__(self, arguments: list[str]) -> None:
        """Run until the sweep is done, or until a signal arrives and the state is saved."""
        from jaxflat import main
        from jaxflat.console import EXIT_PREEMPTED
        from jaxflat.distributed import preemption, sharding

        sharding.set_up_devices()
        requeue = signal.getsignal(signal.SIGTERM)
        assert callable(requeue)  # submitit's
        preemption.install_handlers()
        try:
            code = main.main(arguments)
        except SystemExit as end:  # interrupted before there was anything to save
            code = end.code
        if code == EXIT_PREEMPTED:
            requeue(signal.SIGTERM, None)
        if code:
            sys.exit(code)


def main() -> None:
    """Submit the workers; print the id and log file of each job."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workers", type=int, required=True, help="number of jobs")
    parser.add_argument("--minutes", type=int, required=True, help="time limit of each job")
    parser.add_argument("--slurm", default="", help="options for sbatch: NAME=VALUE,NAME=VALUE")
    parser.add_argument("--logs", default="runs/slurm", help="default: %(default)s")
    flags, arguments = parser.parse_known_args()
    options = dict(option.split("=", 1) for option in flags.slurm.split(",") if option)
    executor = submitit.SlurmExecutor(folder=flags.logs, max_num_timeout=1000)
    executor.update_parameters(
        job_name="jaxflat",
        time=flags.minutes,
        signal_delay_s=120,
        array_parallelism=flags.workers,
        additional_parameters={"requeue": True, **options},
    )
    for job in executor.map_array(Worker(), [arguments] * flags.workers):
        print(f"job {job.job_id}: {job.paths.stderr}")


if __name__ == "__main__":
    main()
