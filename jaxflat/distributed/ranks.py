"""One run in several processes: how they find each other, exchange values, and end together.

Each process uses the devices of its host, and all do the same work in the same order. Only rank 0
reads and writes files: the others get what it reads, and the errors that its writes raise. The rank
is a global variable, because a process has one rank, in one run, until it exits.

The processes exchange values through JAX's coordination service, not over the devices. If one
process sent a message over the devices alone, the others would take it for a part of their next
computation.
"""

import functools
import itertools
import os
import pickle
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MODES = ("auto", "on", "off")
SILENCE_LIMIT = (
    30  # seconds; a process that is silent for longer counts as dead, and ends the others
)
FOREVER = 10**9  # milliseconds; rank 0 may train a teacher for days while the others wait
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_REMEDY = f"start it with srun or mpirun, on a TPU pod, or set {', '.join(VARIABLES)}"


class ClusterError(ValueError):
    """No cluster was found, or its description is incomplete; the message is one line."""


_rank, _num_ranks = 0, 1
_exchanges = itertools.count()
_inside_rank_0 = False  # within a function that only rank 0 calls


def join_cluster(mode: str) -> None:
    """Join the other processes of this run. Call it before anything touches a device.

    mode: "off" never joins. "auto" joins if JAX detects a cluster (Slurm, Open MPI, Kubernetes, a
    TPU pod) or if `VARIABLES` describe one. "on" requires a cluster.

    Raises ClusterError if the mode is "on" and there is no cluster, or if the cluster is only
    partly described. Any error while joining a detected cluster propagates: without the others,
    each host would train alone.
    """
    global _rank, _num_ranks
    if mode == "off":
        return
    import jax  # imported late, as everywhere in this file: commands that only read files need none

    address, num_processes, process = _describe_cluster()
    if address is None:
        if mode == "on":
            raise ClusterError(f"--multihost=on, but there is no cluster; {_REMEDY}")
        return
    if num_processes == 1:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM itself
    jax.distributed.initialize(
        address,
        num_processes,
        process,
        cluster_detection_method="deactivate",  # done above; this process owns all local devices
        heartbeat_timeout_seconds=SILENCE_LIMIT,
        shutdown_timeout_seconds=SILENCE_LIMIT,
    )
    _rank, _num_ranks = jax.process_index(), jax.process_count()


def rank() -> int:
    """Return the number of this process, from 0."""
    return _rank


def is_rank_0() -> bool:
    """Say whether this is the process that writes and prints."""
    return _rank == 0


def all_gather(value: T, name: str, timeout: int = FOREVER) -> list[T]:
    """Return the values of all ranks, in order, once all have called this with the same name.

    Raises RuntimeError if a rank is dead, or has not called it within `timeout` milliseconds. Also
    raises it if a rank has called it with another name, so is at another place of the program.
    """
    if _num_ranks == 1 or _inside_rank_0:
        return [value]
    client, number = coordination_client(), next(_exchanges)
    client.key_value_set_bytes(f"jaxflat/{number}/{_rank:06}", pickle.dumps((name, value)))
    client.wait_at_barrier(f"jaxflat/{number}", timeout)
    if number:  # all ranks have read the values of the exchange before
        client.key_value_delete(f"jaxflat/{number - 1}/{_rank:06}")
    sent = [
        pickle.loads(text)
        for _, text in sorted(client.key_value_dir_get_bytes(f"jaxflat/{number}/"))
    ]
    if len({other for other, _ in sent}) > 1:
        raise RuntimeError(f"the ranks have diverged: they exchange {[other for other, _ in sent]}")
    return [value for _, value in sent]


def on_rank_0(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that only rank 0 runs it; all ranks get what it returns or raises.

    All ranks must call it, in the same order. Within it, rank 0 exchanges nothing with the others.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _num_ranks == 1 or _inside_rank_0:
            return function(*args, **kwargs)
        outcome: Any = None
        if is_rank_0():
            outcome = _run_on_rank_0(functools.partial(function, *args, **kwargs))
        received = all_gather(outcome, function.__qualname__)[0]
        value, error = outcome if is_rank_0() else received  # rank 0 keeps the traceback
        if error is not None:
            raise error
        return value

    return call


def all_ranks_failed() -> bool:
    """Say whether every rank has failed; each calls this after its own failure.

    If not, this process should exit: the others wait for it, notice its death, and exit too.
    """
    try:
        all_gather(None, "failure", SILENCE_LIMIT * 1000)
    except RuntimeError:
        return False
    return True


def _run_on_rank_0(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Return (value, None), or (None, the error) in a form that pickle can send."""
    global _inside_rank_0
    _inside_rank_0 = True
    try:
        return function(), None
    except BaseException as error:  # the others must not wait for a value that never comes
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error
    finally:
        _inside_rank_0 = False


def _describe_cluster() -> tuple[str | None, int | None, int | None]:
    """Return (address of rank 0, number of processes, this rank); all None without a cluster."""
    address = os.environ.get(VARIABLES[0])
    num_processes, process = _read_number(VARIABLES[1]), _read_number(VARIABLES[2])
    found = address, num_processes, process
    if None in found:
        try:
            found = detect_cluster(address, num_processes, process)
        except Exception as error:  # for example a pod that may not query Kubernetes about its job
            text = " ".join(str(error).split())
            raise ClusterError(
                f"could not query the cluster: {type(error).__name__}: {text}; "
                "use --multihost=off to run on this host only"
            ) from error
    if None in found and found != (None, None, None):
        missing = VARIABLES[found.index(None)]
        raise ClusterError(f"{missing} is not set, and no detected cluster gives it; {_REMEDY}")
    return found


def _read_number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdigit():
        raise ClusterError(f"{name}={text!r} must be a number")
    return None if text is None else int(text)


# The only two places that import private names of JAX. tests/distributed/test_ranks.py says what to
# do when JAX moves them.


def detect_cluster(
    address: str | None, num_processes: int | None, process: int | None
) -> tuple[str | None, int | None, int | None]:
    """Fill in (address of rank 0, number of processes, this rank) from the cluster JAX detects."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() uses

    found = ClusterEnv.auto_detect_unset_distributed_params(
        address, num_processes, process, None, None, 300
    )
    return found[:3]


def coordination_client() -> Any:
    """Return the client of JAX's coordination service, which has no public name."""
    from jax._src.distributed import global_state

    return global_state.client
