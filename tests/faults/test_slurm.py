"""The shipped Slurm scripts in a real Slurm of one node, which the test starts on this machine.

It needs root and Debian's packages slurm-wlm and munge; their services need not run.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from jaxflat.storage.files import read_lines

ROOT = Path(__file__).parents[2]
PATIENCE = 900  # seconds, on a busy machine
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
if os.geteuid() != 0:
    MISSING.append("root")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}"),
]
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} CPUs={cpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SWEEP = """
from tests.support.sweeps import tiny_config
from jaxflat.config import param


def get_config(scale=None):
    config = tiny_config()
    config.phase_order = ("pretrain",)
    del config.phases.drift
    config.phases.pretrain.update({"steps": 6000, "checkpoint_steps": (6000,)})
    config.training.update({"steps_per_call": 20, "save_every": 6000})
    config.flatness.measures = ("fisher_trace",)
    return config


def get_sweep(scale=None):
    return param("seed", range(3))
"""


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def succeeds(*command: str) -> bool:
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def until(condition):
    """Return what `condition` returns, once that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return value


def free_ports(number: int) -> list[int]:
    """Return ports on which no process listens."""
    sockets = [socket.create_server(("", 0)) for _ in range(number)]
    ports = [made.getsockname()[1] for made in sockets]
    for made in sockets:
        made.close()
    return ports


def munged(folder: Path) -> list[str]:
    """Return the command that starts Munge with a new key."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    files = [f"--{name}={folder}/munge.{name[:-5]}" for name in ("pid-file", "log-file")]
    files += [f"--seed-file={folder}/munge.seed", f"--socket={folder}/munge.socket"]
    return ["munged", "--foreground", f"--key-file={key}", *files]


@pytest.fixture
def slurm(monkeypatch):
    """Yield the folder of a running Slurm; the environment variables are set for its users."""
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))
    folder.chmod(0o755)  # Munge requires a folder that all users may enter
    host, cpus = socket.gethostname().partition(".")[0], os.cpu_count()
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(folder=folder, host=host, cpus=cpus, ports=free_ports(2)))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    ready = {
        "munged": (folder / "munge.socket").exists,
        "slurmctld": lambda: succeeds("scontrol", "ping"),
        "slurmd": lambda: "idle" in output_of("sinfo", "--noheader"),
    }
    with (folder / "daemons.log").open("w") as log, ExitStack() as daemons:
        for command in (munged(folder), ["slurmctld", "-D"], ["slurmd", "-D"]):
            daemon = daemons.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            daemons.callback(daemon.terminate)
            until(ready[command[0]])
        yield folder
        output_of("scancel", "--user=root")
        until(lambda: not output_of("squeue", "--noheader"))
    shutil.rmtree(folder)


def interrupt_and_await(job: str, workdir: Path) -> None:
    """Stop all tasks of a job once they train; wait until Slurm has reacted."""

    def first_lines():
        return all(list(read_lines(p / "metrics.jsonl")) for p in points()) and len(points()) > 1

    def points():
        return list(workdir.glob("seed=*"))

    until(first_lines)
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    saved = until(lambda: [p for p in points() if any((p / "recovery").glob("[0-9]*"))])
    curves = {path: (path / "metrics.jsonl").read_bytes() for path in saved}
    until(lambda: not output_of("squeue", "--noheader", f"--job={job}"))
    tasks = output_of("scontrol", "show", "job", job)
    assert tasks.count("JobState=COMPLETED") == tasks.count("Restarts=1") == 2, tasks
    for path, curve in curves.items():
        assert 0 < len(curve) < 0.9 * (path / "metrics.jsonl").stat().st_size
        assert (path / "metrics.jsonl").read_bytes().startswith(curve)
    assert [(p / "status.json").read_text().count('"done"') for p in points()] == [1] * 3


def test_array_and_submitit_finish_what_a_signal_interrupted(slurm):
    pytest.importorskip("submitit")
    config = slurm / "tiny_sweep.py"
    config.write_text(SWEEP)

    by_array = [f"--config={config}", f"--workdir={slurm / 'array'}"]
    script = str(ROOT / "launch" / "slurm.sbatch")
    options = ["--parsable", "--array=0-1", f"--output={slurm}/%x-%A_%a.log"]
    job = output_of("sbatch", *options, script, *by_array).strip()
    interrupt_and_await(job, slurm / "array")

    by_submitit = [f"--config={config}", f"--workdir={slurm / 'submitit'}"]
    script = str(ROOT / "launch" / "submitit_sweep.py")
    options = ["--workers=2", "--minutes=30", f"--logs={slurm / 'logs'}"]
    said = output_of(sys.executable, script, *options, *by_submitit)
    interrupt_and_await(said.split()[1].partition("_")[0], slurm / "submitit")

    results = [(slurm / name / "results.csv").read_bytes() for name in ("array", "submitit")]
    assert results[0] == results[1]
