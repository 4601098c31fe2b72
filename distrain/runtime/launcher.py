"""What the launcher (torchrun, for example) says in the environment about the store, and whether it still runs."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence

from distrain.errors import ConfigError
from distrain.health.last_line import LAUNCHER
from distrain.runtime import program
from distrain.runtime.world import MAX_DIGITS

#: How often a rank looks whether its launcher still runs, in seconds.
_POLL_SECONDS = 0.5

#: The process that started this one. Read at the start: after its end the system names another one.
_parent = os.getppid()


def _remember_parent() -> None:
    global _parent
    _parent = os.getppid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_parent)


def store_address(world_size: int) -> tuple[str, int]:
    """Host and port of the store.

    Args:
        world_size: Number of ranks, for the error message.

    Raises:
        ConfigError: The port is missing or is not a port number.
    """
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "")
    if not port.isdecimal() or len(port) > MAX_DIGITS or not 0 < int(port) < 1 << 16:
        raise ConfigError("MASTER_PORT", port, f"WORLD_SIZE={world_size} needs the port at which ranks meet")
    return address, int(port)


def serves_store() -> bool:
    """Whether the launcher serves the store, which then outlives the ranks; otherwise rank 0 serves it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def command(arguments: Sequence[str], environment: Mapping[str, str], *, ranks: int | None = None) -> str:
    """What to type in a shell, or in a Python program, to start such a run.

    Args:
        arguments: ``sys.argv``.
        environment: The environment variables, which say whether torchrun started this process.
        ranks: Ranks on this host; ``None``: as many as there are.
    """
    ranks = ranks or int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if program.function is not None:
        return f"{program.function}(…, nproc={ranks})" if ranks > 1 else f"{program.function}(…)"
    under_torchrun = ranks > 1 or is_rank(environment)
    script, *settings = arguments
    if LAUNCHER in environment or (program.is_dispatched() and under_torchrun and not is_rank(environment)):
        others = [key for key in program.removed() if not key.startswith("nproc=")]
        return shlex.join([*program.on_one_rank(script), f"nproc={ranks}", *others, *settings])
    if not under_torchrun:
        return shlex.join([*program.on_one_rank(script), *settings])
    words = ["torchrun", "--nproc-per-node", str(ranks)]
    if environment.get("GROUP_WORLD_SIZE", "1") != "1":
        words += ["--nnodes", environment["GROUP_WORLD_SIZE"]]
    return shlex.join([*words, *program.under_torchrun(script), *settings])


def is_torchrun() -> bool:
    """Whether torchrun's agent, or distrain's, started this rank; unless killed, it ends its ranks when it ends."""
    return is_rank(os.environ)


def is_rank(environment: Mapping[str, str]) -> bool:
    """Whether torchrun's agent, or distrain's, set these variables."""
    return "TORCHELASTIC_RUN_ID" in environment


def has_ended() -> bool:
    """Whether the agent that started this rank has ended."""
    return is_torchrun() and os.getppid() != _parent


def call_at_end(callback: Callable[[], None], closing: threading.Event) -> None:
    """Calls back, in a thread, when the agent that started this rank has ended; does nothing without an agent.

    Args:
        callback: The function to call.
        closing: Set when nobody wants to know any more.
    """
    if not is_torchrun():
        return

    def wait_for_end() -> None:
        while not has_ended():
            if closing.wait(_POLL_SECONDS):
                return
        callback()

    threading.Thread(target=wait_for_end, name="distrain-launcher-watch", daemon=True).start()
