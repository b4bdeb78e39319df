"""The processes of a run: descriptions of a cluster, work of rank 0, the private names of JAX."""

import pickle
import subprocess
import sys

import jax
import pytest

from jaxflat.distributed import ranks

MOVED = f"""
JAX {jax.__version__} has moved a private name that jaxflat needs. Only the last two functions of
jaxflat/distributed/ranks.py import private names of JAX; change the one that failed:
- detect_cluster: see in jax/_src/distributed.py how jax.distributed.initialize() now fills in the
  coordinator's address, the number of processes and the rank of this one;
- coordination_client: see there where initialize() now keeps the coordination service's client, and
  what its key-value and barrier methods are called (`all_gather` calls them).
Prefer a public name if JAX has one by now, and run tests/faults/test_hosts.py afterwards.
"""

CLIENT = """
import socket, jax
from jaxflat.distributed import ranks
with socket.socket() as found:
    found.bind(("localhost", 0))
    port = found.getsockname()[1]
jax.distributed.initialize(f"localhost:{port}", 1, 0, cluster_detection_method="deactivate")
ranks._num_ranks = 2  # or it would exchange nothing
print(ranks.all_gather("first", "one", 9000), ranks.all_gather("second", "two", 9000))
"""


def test_private_names_of_jax_are_where_ranks_expects_them(monkeypatch):
    for name in ranks.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    try:
        found = ranks.detect_cluster("localhost:1", None, None)
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}\n{MOVED}")
    assert found == ("localhost:1", None, None), MOVED
    command = [sys.executable, "-c", CLIENT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "['first'] ['second']\n", f"{done.stderr}\n{MOVED}"


def test_a_partly_described_cluster_is_an_error(monkeypatch):
    for name in ranks.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    ranks.join_cluster("auto")
    assert ranks.is_rank_0()
    with pytest.raises(ranks.ClusterError, match="--multihost=on, but there is no cluster"):
        ranks.join_cluster("on")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(ranks.ClusterError, match="JAX_NUM_PROCESSES is not set"):
        ranks.join_cluster("auto")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ranks.ClusterError, match="JAX_NUM_PROCESSES='two' must be a number"):
        ranks.join_cluster("auto")
    ranks.join_cluster("off")


def test_a_single_process_calls_functions_of_rank_0_directly():
    @ranks.on_rank_0
    def divide(x, y):
        """Say so."""
        return x / y

    assert divide(4, 2) == 2
    assert divide.__doc__ == "Say so."
    assert ranks.all_gather("x", "name") == ["x"]
    with pytest.raises(ZeroDivisionError):
        divide(1, 0)


class OtherRank:
    """A coordination service at which rank 1 has called `all_gather("theirs", name)`."""

    def __init__(self, name: str):
        self.sent = {}
        self.name = name

    def key_value_set_bytes(self, key, text):
        self.sent[key] = text

    def wait_at_barrier(self, name, timeout):
        self.sent[f"{name}/000001"] = pickle.dumps((self.name, "theirs"))

    def key_value_dir_get_bytes(self, folder):
        return [(key, text) for key, text in self.sent.items() if key.startswith(folder)]


def test_ranks_at_different_places_of_the_program_get_an_error(monkeypatch):
    monkeypatch.setattr(ranks, "_num_ranks", 2)
    monkeypatch.setattr(ranks, "_exchanges", iter((0, 0)))
    monkeypatch.setattr(ranks, "coordination_client", lambda: OtherRank("manifest"))
    assert ranks.all_gather("ours", "manifest") == ["ours", "theirs"]
    with pytest.raises(RuntimeError, match=r"diverged: they exchange \['round', 'manifest'\]"):
        ranks.all_gather("ours", "round")
