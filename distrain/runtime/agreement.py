"""Parts of set-up that each rank does by itself: if one of them can't, all ranks end at once and say why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from distrain.errors import ConfigError, PeerLost, Terminated, config_error_from_line, described

if TYPE_CHECKING:
    from distrain.communication.collectives import Communicator
    from distrain.runtime.runtime import Runtime

T = TypeVar("T")


def agreed(ranks: Communicator, runtime: Runtime, part: Callable[[], T]) -> T:
    """Runs a part of set-up on several ranks, which call it together, and returns when all have done it.

    Without that the other ranks would go on, and wait in their next collective for a rank that has failed.

    Args:
        ranks: Those that do it.
        runtime: This rank's surroundings.
        part: The ranks don't communicate in it: one of them may raise an error at any point of it.

    Returns:
        What ``part`` returned on this rank.

    Raises:
        ConfigError: On all ranks, if ``part`` raised it on one of them, and nothing else on another one.
        PeerLost: ``part`` raised anything else on another rank. That rank raises the error itself.
    """
    try:
        result = part()
    except Terminated:
        # Whoever ends this rank ends the others too.
        raise
    except Exception as error:
        _agree(ranks, runtime, error)
        raise
    _agree(ranks, runtime, None)
    return result


def _agree(ranks: Communicator, runtime: Runtime, error: Exception | None) -> None:
    """Raises what this rank must raise, unless that is its own error, or nothing."""
    world, device = runtime.world, runtime.device
    # A small message, since mostly there is no error.
    if ranks.size == 1 or not ranks.all_reduce(torch.tensor(int(error is not None), device=device), "max"):
        return
    refused = isinstance(error, ConfigError)
    problem = "" if error is None else str(error) if refused else described(error)
    own = {"rank": world.rank, "host": world.host, "refused": refused, "problem": problem}
    found = ranks.all_gather_json(own, device)
    failed = [each for each in found if each["problem"]]
    first = next((each for each in failed if not each["refused"]), failed[0])
    if first["refused"]:
        # If others would not refuse it, or would for another reason, it depends on the rank.
        alike = all(each["problem"] == first["problem"] for each in found)
        where = "" if alike else f" (rank {first['rank']} on {first['host']})"
        raise config_error_from_line(first["problem"] + where) from error
    if error is None or refused:
        raise PeerLost(first["rank"], first["host"], f"its set-up failed {first['problem']}") from error
