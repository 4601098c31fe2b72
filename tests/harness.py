"""Runs a function on N gloo ranks of this machine, as torchrun would, for tests.

Ports are the system's choice (the parent serves the store), every rank has a hard time limit, a child's traceback is
raised in the parent, and no process is left behind.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

#: Starts processes in milliseconds: its server imports torch and distrain once, and each is forked from it, before any
#: thread exists there.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])

#: Seconds after which something that a test waits for counts as hanging; far more than a busy machine needs.
HANG_SECONDS = 300


def soaked(cases: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Parameters of a test: the cases in ``always`` belong to every run, the others to ``make test-soak`` alone."""
    return [pytest.param(case, marks=() if case in always else pytest.mark.soak) for case in cases]


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time; the message says which and holds its traceback."""


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set for a rank on this host."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        # Each rank may only use its share of the cores, or they starve each other.
        "OMP_NUM_THREADS": "1",
    }


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = HANG_SECONDS) -> list[Any]:
    """Calls ``function(*args)`` on every rank at the same time.

    Args:
        function: A module-level function; its result must be picklable.
        world_size: Number of ranks; 1 runs in a child process too, without torchrun's variables.
        *args: Handed to each rank.
        timeout: Seconds after which all ranks are killed and :class:`RankFailed` is raised.

    Returns:
        Each rank's result, in order of rank.

    Raises:
        RankFailed: With the traceback of the first rank that failed.
    """
    outcomes = run_ranks_to_the_end(function, world_size, *args, timeout=timeout)
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, RankFailed):
            raise RankFailed(f"rank {rank} of {world_size}: {outcome}")
    return outcomes


def run_ranks_to_the_end(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = HANG_SECONDS
) -> list[Any]:
    """As :func:`run_ranks`, but a failure is an outcome: a :class:`RankFailed` in the rank's place."""
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout)
    )
    ends: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for rank in range(world_size):
            mine, theirs = CONTEXT.Pipe(duplex=False)
            variables = environment(rank, world_size, store.port) if world_size > 1 else {}
            process: BaseProcess = CONTEXT.Process(target=_rank, args=(theirs, variables, function, args), daemon=True)
            process.start()
            theirs.close()
            ends.append(mine)
            processes.append(process)
        return _collect(ends, processes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for end in ends:
            end.close()


def _collect(ends: list[Connection], processes: list[BaseProcess], timeout: float) -> list[Any]:
    outcomes: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(outcomes) < len(ends):
        waiting = {ends[rank]: rank for rank in range(len(ends)) if rank not in outcomes}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in waiting.values():
                outcomes[rank] = RankFailed(f"still running after {timeout:g} s")
        for end in ready:
            rank = waiting[end]  # type: ignore[index]
            try:
                kind, value = pickle.loads(ends[rank].recv_bytes())
                outcomes[rank] = value if kind == "result" else RankFailed(value)
            except EOFError:
                processes[rank].join()
                outcomes[rank] = RankFailed(f"died with exit code {processes[rank].exitcode}")
    return [outcomes[rank] for rank in range(len(ends))]


def _rank(end: Connection, variables: Mapping[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        message = ("result", function(*args))
        # Plain bytes: a connection's own pickler would share tensors by descriptors that die with this process.
        data = pickle.dumps(message)
    except BaseException:
        data = pickle.dumps(("error", traceback.format_exc()))
    end.send_bytes(data)
    end.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    # No atexit handlers: a rank that failed may hold a group whose threads never end.
    os._exit(0)
