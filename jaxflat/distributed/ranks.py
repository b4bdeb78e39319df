"""Several processes that make one run: how they start, agree, and end together.

Each has the devices of its host, and all do the same work in the same order. Files are the first
one's affair: the others get what it reads there, and what its writing raises. They tell each other
through the coordination service of JAX; a message over the devices that one process sends alone
would be taken for a part of the next computation.
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
HEARTBEAT = 30  # seconds: a process that is silent for as long is dead, and ends the others
FOREVER = 10**9  # milliseconds: one may train a teacher for days while the others wait
GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_HOW = f"start it by srun or mpirun, on a TPU pod, or set {', '.join(GIVEN)}"


class ClusterError(ValueError):
    """There is no cluster, or one that is not fully described; the message is one line."""


_process, _num_processes = 0, 1
_exchanges = itertools.count()
_alone = False  # in what only the first process does


def start(mode: str) -> None:
    """Join the other processes of this run, before anything touches a device.

    mode: "off" to stay alone; "auto" to join where there are others: on Slurm, Open MPI, Kubernetes
    and TPU pods, as JAX finds them, or as the variables `GIVEN` say; "on" to insist on a cluster.
    Raises ClusterError where there is none to insist on. Whatever goes wrong with one that there is
    is raised as it comes: without the others each host would train alone.
    """
    global _process, _num_processes
    if mode == "off":
        return
    import jax  # late, as everywhere here: what reads files only needs none

    address, num_processes, process = _cluster()
    if address is None:
        if mode == "on":
            raise ClusterError(f"--multihost=on, but there is no cluster; {_HOW}")
        return
    if num_processes == 1:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.distributed.initialize(
        address,
        num_processes,
        process,
        cluster_detection_method="deactivate",  # it is known, and all devices here are this one's
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=HEARTBEAT,
    )
    _process, _num_processes = jax.process_index(), jax.process_count()


def _cluster() -> tuple[str | None, int | None, int | None]:
    """Return (address of the first process, how many there are, which this is), None if none."""
    from jax._src.clusters import ClusterEnv  # as jax.distributed.initialize() finds them

    address = os.environ.get(GIVEN[0])
    num_processes, process = _number(GIVEN[1]), _number(GIVEN[2])
    if None in (address, num_processes, process):
        try:
            address, num_processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
                address, num_processes, process, None, None, 300
            )
        except Exception as error:  # such as: a pod that may not ask Kubernetes about its job
            said = " ".join(str(error).split())
            raise ClusterError(
                f"a cluster that cannot be asked: {type(error).__name__}: {said}; "
                "--multihost=off stays alone"
            ) from error
    found = address, num_processes, process
    if None in found and found != (None, None, None):
        missing = GIVEN[found.index(None)]
        raise ClusterError(f"{missing} is not set, and there is no cluster that tells; {_HOW}")
    return found


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdigit():
        raise ClusterError(f"{name}={text!r} must be a number")
    return None if text is None else int(text)


def index() -> int:
    """Return which process this is, from 0."""
    return _process


def is_first() -> bool:
    """Say whether this is the process that writes and prints."""
    return _process == 0


def gather(value: T, name: str, timeout: int = FOREVER) -> list[T]:
    """Return the values of all processes, once all have come here under the same name.

    Raises RuntimeError where one has not within `timeout` milliseconds, or is dead.
    """
    if _num_processes == 1 or _alone:
        return [value]
    from jax._src.distributed import global_state  # its service has no public name

    client: Any = global_state.client
    number = next(_exchanges)
    client.key_value_set_bytes(f"jaxflat/{number}/{_process:06}", pickle.dumps(value))
    client.wait_at_barrier(f"jaxflat/{number}/{name}", timeout)
    if number:  # all have read what was told before
        client.key_value_delete(f"jaxflat/{number - 1}/{_process:06}")
    told = client.key_value_dir_get_bytes(f"jaxflat/{number}/")
    return [pickle.loads(text) for _, text in sorted(told)]


def first(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function that only the first process calls; all get what it returns or raises.

    All must come to it, in the same order. Within it the first process is alone.
    """

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        if _num_processes == 1 or _alone:
            return function(*args, **kwargs)
        outcome: Any = None
        if is_first():
            outcome = _outcome(functools.partial(function, *args, **kwargs))
        told_by_first = gather(outcome, function.__qualname__)[0]
        value, error = outcome if is_first() else told_by_first  # with its traceback
        if error is not None:
            raise error
        return value

    return told


def _outcome(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Return (value, None), or (None, what was raised) in a form that can be sent."""
    global _alone
    _alone = True
    try:
        return function(), None
    except BaseException as error:  # the others must not wait for what will not come
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error
    finally:
        _alone = False


def failed_together() -> bool:
    """Say whether all processes have come to a failure, each to one.

    Where not, this one should end: the others wait for it in vain, and end when they miss it.
    """
    try:
        gather(None, "failure", HEARTBEAT * 1000)
    except RuntimeError:
        return False
    return True
