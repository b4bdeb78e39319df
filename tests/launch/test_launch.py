"""The scripts in launch/, with stand-ins for the commands of clusters, and the manifests."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jaxflat.storage import files

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
STAND_IN = """#!/usr/bin/env bash
# Notes how it was called; its answers are the next lines of two files.
next() { head -n 1 "$1"; sed -i 1d "$1"; }
echo "${0##*/} $*" >> calls
case "${0##*/} $*" in
    *"queued-resources list"*) next states ;;
    *"-m jaxflat.main"*) exit "$(next codes)" ;;
esac
"""
SLICE = {
    "NAME": "sizes",
    "ZONE": "us-east5-b",
    "TYPE": "v6e-16",
    "IMAGE": "v2-alpha-tpuv6e",
    "SHARE": "10.0.0.2:/share",
}

GONE = ("ACTIVE", *["SUSPENDED"] * 2, "", "ACTIVE")  # the slice, while a command runs


@pytest.fixture
def launch(tmp_path):
    """Give a function that runs a script, and returns its exit code and the calls it made."""
    for name in ("gcloud", "git", "tar", "sleep", "python", "srun", "scontrol", "timeout"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)

    def run(script: str, *arguments: str, states=(), codes=()):
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "calls").write_text("")
        task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "9"}
        environment = os.environ | SLICE | task | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", str(LAUNCH / script), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        return SimpleNamespace(code=done.returncode, calls=calls, said=done.stdout + done.stderr)

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


def test_local_goes_on_until_done(launch):
    ran = launch("local.sh", "--config=a.py", codes=(75, 75, 3))
    assert ran.code == 3
    assert ran.calls == ["python -m jaxflat.main --config=a.py"] * 3


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (3, False), (75, True), (143, True)])
def test_a_task_of_slurm_that_was_told_to_stop_is_requeued(launch, code, requeued):
    ran = launch("slurm.sbatch", "--config=a.py", codes=(code,))
    assert ran.code == (0 if requeued else code)
    assert ran.calls[0] == "srun python -m jaxflat.main --config=a.py"
    assert ran.calls[1:] == ["scontrol requeue 7_2"] * requeued


def make_workdir(workdir: Path, states: dict[str, str]) -> None:
    """Make the files of a sweep whose points have these states."""
    workdir.mkdir(parents=True)
    (workdir / "sweep.json").write_text("{}")
    (workdir / "results.csv").write_text("point")
    for point, state in states.items():
        for step in ("checkpoints/10", "recovery/20"):
            (workdir / point / step).mkdir(parents=True)
            (workdir / point / step / "manifest.json").write_text("{}")
        files.write_json(workdir / point / "status.json", {"state": state, "reason": ""})
        for name in ("config.json", "metrics.jsonl", "flatness.jsonl", "events.1"):
            (workdir / point / name).write_text("{}")


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


LINES = {f"a/{name}" for name in ("config.json", "status.json", "metrics.jsonl", "flatness.jsonl")}
BROUGHT = {"sweep.json", "results.csv", "b/status.json", *LINES}  # b is half-done


def test_one_gpu_brings_back_finished_points_without_checkpoints(launch, tmp_path):
    make_workdir(tmp_path / "runs" / "own-gpu", {"a": "done", "b": "preempted"})
    ran = launch("one_gpu.sh", "own.py:gpu", "--points=0", "--minutes=8", codes=(75,))
    assert ran.code == 75, ran.said
    command = "python -m jaxflat.main --config=own.py:gpu --workdir=runs/own-gpu --points=0"
    assert ran.calls == [f"timeout --preserve-status --kill-after=40 420 {command}"]
    assert files_in(tmp_path / "results" / "own-gpu") == BROUGHT


def test_one_gpu_continues_on_another_disk(launch, tmp_path):
    make_workdir(tmp_path / "old", {"a": "done", "b": "preempted"})
    assert launch("one_gpu.sh", "own.py", "--workdir=old", "--results=here", codes=(0,)).code == 0
    ran = launch("one_gpu.sh", "own.py", "--workdir=new", "--results=here", codes=(3,))
    assert ran.code == 3
    assert ran.calls == ["python -m jaxflat.main --config=own.py --workdir=new"]
    assert files_in(tmp_path / "new") == BROUGHT - {"b/status.json"}


def test_one_gpu_keeps_what_another_disk_has_finished(launch, tmp_path):
    """A point of the second disk is finished there, and its state here stays finished."""
    make_workdir(tmp_path / "one", {"a": "done", "b": "preempted"})
    make_workdir(tmp_path / "two", {"b": "done", "c": "done"})
    for workdir in ("one", "two", "one"):
        ran = launch("one_gpu.sh", "own.py", f"--workdir={workdir}", "--results=here", codes=(0,))
        assert ran.code == 0, ran.said
    for point in "abc":
        for folder in ("one", "here"):
            status = json.loads((tmp_path / folder / point / "status.json").read_text())
            assert status["state"] == "done", (point, folder)
    assert not (tmp_path / "one" / "b" / "recovery").exists()


def test_one_gpu_saves_when_its_queue_stops_it(tmp_path):
    make_workdir(tmp_path / "runs" / "own-gpu", {"a": "done"})
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\ntrap 'exit 75' TERM; touch began; while :; do sleep 0.05; done")
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / "one_gpu.sh"), "own.py:gpu", "--minutes=8"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as script:
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        script.terminate()
        assert script.wait(timeout=60) == 75
    assert (tmp_path / "results" / "own-gpu" / "a" / "flatness.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--minutes=8",), "the first argument must be FILE.py:SCALE"),
        (("own.py:gpu", "--minutes=1"), "--minutes=1 must be a whole number, at least 2"),
        (("own.py:gpu", "--workdir", "here"), "write --workdir=VALUE, with an equals sign"),
        (("own.py", "--workdir=w", "--results=./w"), "--results=./w must be another folder than"),
    ],
)
def test_one_gpu_names_a_bad_argument(launch, tmp_path, arguments, error):
    ran = launch("one_gpu.sh", *arguments)
    assert (ran.code, ran.calls) == (2, [])
    assert ran.said.startswith(f"error: {error}")
    assert ran.said.count("\n") == 1


CONFIG = """
from jaxflat.config import param
from tests.support.sweeps import tiny_config

def get_config(_=None):
    config = tiny_config()
    config.phases.pretrain.checkpoint_steps, config.phase_order = (3,), ("pretrain",)
    del config.phases.drift
    config.flatness.update({"measures": ("fisher_trace",), "invariant": False})
    config.probes.update({"labelings": ("map",), "belief_state": False, "shots": (8,)})
    return config

def get_sweep(_=None):
    return param("seed", range(2))
"""


@pytest.mark.slow
def test_one_gpu_runs_no_finished_point_again(tmp_path):
    """The second command also writes the report, without the checkpoints of the first point."""
    (tmp_path / "own.py").write_text(CONFIG)
    binaries = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for arguments in (["--points=0", "--stages=train,flatness,probes"], []):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # another disk
        command = ["bash", str(LAUNCH / "one_gpu.sh"), "own.py", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(": started\n") == 1
    assert (tmp_path / "runs" / "own-laptop" / "report.html").exists()
    rows = (tmp_path / "results" / "own-laptop" / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 2


def test_tpu_commands_are_those_that_were_reviewed(launch):
    """With --dry-run in any place; it stands first in the next test."""
    arguments = ["--config=configs/model_size_sweep.py:paper", "--dry-run", "--points=*seed=0*"]
    ran = launch("tpu_pod.sh", *arguments)
    assert (ran.code, ran.calls) == (0, [])
    assert ran.said == (ROOT / "tests" / "golden" / "tpu_pod.txt").read_text()
    for line in ran.said.splitlines():  # may be pasted
        assert shlex.join(shlex.split(line)) == line


def words(calls: list[str]) -> str:
    """Return the steps that matter, in short."""
    names = {"create sizes": "create", "delete sizes": "delete", "jaxflat.main": "run"}
    names |= {"tar -xzf /tmp": "fetch"}
    found = [name for call in calls for part, name in names.items() if part in call]
    return " ".join(found)


def test_nothing_is_rented_for_a_command_without_a_config(launch):
    ran = launch("tpu_pod.sh", "--dry-run", "--points=0")
    assert (ran.code, ran.calls) == (2, [])
    assert ran.said.startswith("error: --config=FILE.py:SCALE is missing")


def test_a_preempted_slice_is_replaced(launch):
    states = ("", "PROVISIONING", "ACTIVE", "SUSPENDED", "", "ACTIVE")
    ran = launch("tpu_pod.sh", "--config=a.py", states=states, codes=(75, 0))
    assert ran.code == 0, ran.said
    assert words(ran.calls) == "create run delete create run fetch delete"


@pytest.mark.parametrize(
    ("states", "codes", "code", "steps"),
    [
        (("ACTIVE",), (2,), 2, "run fetch delete"),  # unusable input
        (("ACTIVE", "ACTIVE"), (3,), 3, "run fetch delete"),  # some points failed
        (GONE, (1, 0), 0, "run delete create run fetch delete"),
        (("ACTIVE", "ACTIVE"), (255, 0), 0, "run run fetch delete"),  # a lost connection
    ],
)
def test_what_becomes_of_a_slice(launch, states, codes, code, steps):
    ran = launch("tpu_pod.sh", "--config=a.py", states=states, codes=codes)
    assert (ran.code, words(ran.calls)) == (code, steps), ran.said


def test_a_setting_that_lacks_is_named(launch, monkeypatch):
    monkeypatch.setitem(SLICE, "ZONE", "")
    ran = launch("tpu_pod.sh", "--config=a.py")
    assert (ran.code, ran.calls) == (2, [])
    assert "ZONE is not set" in ran.said


@pytest.fixture(scope="module")
def manifests():
    text = (LAUNCH / "kubernetes" / "jobset.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_jobset_has_the_keys_of_its_schema(manifests):
    """It uses only keys of jobset.x-k8s.io/v1alpha2."""
    jobset = manifests["JobSet"]
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert jobset["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    policy = jobset["spec"]["failurePolicy"]
    assert type(policy["maxRestarts"]) is int
    [rule] = policy["rules"]
    assert rule.keys() == {"name", "action", "onJobFailureReasons"}
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    [job] = jobset["spec"]["replicatedJobs"]
    assert job.keys() == {"name", "replicas", "template"}


def test_one_job_has_all_hosts_and_starts_again_unless_it_is_in_vain(manifests):
    [job] = manifests["JobSet"]["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["completionMode"]) == (1, "Indexed")  # as jax.distributed wants
    assert spec["parallelism"] == spec["completions"] > 1
    assert (spec["backoffLimit"], spec["template"]["spec"]["restartPolicy"]) == (0, "Never")
    [rule] = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    assert rule["onExitCodes"]["containerName"] == spec["template"]["spec"]["containers"][0]["name"]


def test_hosts_may_find_each_other(manifests):
    account = manifests["ServiceAccount"]["metadata"]["name"]
    [job] = manifests["JobSet"]["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["template"]["spec"]["serviceAccountName"] == account
    assert manifests["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert manifests["RoleBinding"]["roleRef"]["name"] == manifests["Role"]["metadata"]["name"]
    may = {name: rule["verbs"] for rule in manifests["Role"]["rules"] for name in rule["resources"]}
    assert all({"get", "list"} <= set(may[name]) for name in ("pods", "services", "jobs"))


def test_kubernetes_knows_every_key(manifests):
    """What the client of Kubernetes reads it writes again: it drops keys that it does not know."""
    client = pytest.importorskip("kubernetes.client")
    api = client.ApiClient()
    [job] = manifests["JobSet"]["spec"]["replicatedJobs"]
    parts = {"V1ServiceAccount": manifests["ServiceAccount"], "V1Role": manifests["Role"]}
    parts |= {"V1RoleBinding": manifests["RoleBinding"], "V1JobTemplateSpec": job["template"]}
    for kind, part in parts.items():
        read = api.deserialize(json.dumps(part), kind, "application/json")
        assert api.sanitize_for_serialization(read) == part


def test_image_holds_what_the_command_needs():
    lines = (LAUNCH / "kubernetes" / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert copied == {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "jaxflat", "configs"}
    assert all((ROOT / name).exists() for name in copied)
