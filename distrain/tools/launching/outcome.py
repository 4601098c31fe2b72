"""How a command whose ranks have ended ends itself: its exit code, and the one line that is left to say."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from typing import Any, cast

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from distrain.errors import EXIT_REFUSED, EXIT_STOPPED
from distrain.health.last_line import told_line

#: torch's agent gives ranks this many seconds to end when one has failed, and then kills them.
_AGENT_KILLS_AFTER = 30


def signals(*names: str) -> tuple[signal.Signals, ...]:
    """The signals with these names that the system has; Windows has only some."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


#: Signals that ask a command to end, also those that torch's agent sends to ranks when another one has failed.
STOPPING = signals("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")


@dataclass(frozen=True)
class Outcome:
    """How the ranks of this host ended.

    Attributes:
        code: The exit code for the command.
        line: What is left to say of a failure; empty if the ranks have said all.
        values: What the function returned on each rank of this host, by rank, where ranks run a function.
    """

    code: int
    line: str = ""
    values: dict[int, Any] = field(default_factory=dict)


def outcome_of(failures: dict[int, ProcessFailure]) -> Outcome:
    """The exit code of a command whose ranks ended like this, and what is left to say.

    When one rank fails, the agent ends the others, and they may notice the failure too. So the reason is looked for: a
    rank that was killed; else one that refused its configuration; else one that failed; else one that stopped.

    Args:
        failures: The ranks of this host that did not end with 0, by rank.
    """
    first = min(failure.timestamp for failure in failures.values())
    by_agent = {int(number) for number in STOPPING}
    killed, ended = {}, {}
    for rank, failure in failures.items():
        if failure.exitcode >= 0:
            ended[rank] = failure
        elif -failure.exitcode not in by_agent and failure.timestamp - first < _AGENT_KILLS_AFTER - 1:
            killed[rank] = failure
    for chosen in (killed, _with_code(ended, EXIT_REFUSED), _other_codes(ended), _with_code(ended, EXIT_STOPPED)):
        if chosen:
            return _outcome(chosen, failures)
    return _outcome(failures, failures)


def _with_code(failures: dict[int, ProcessFailure], code: int) -> dict[int, ProcessFailure]:
    return {rank: failure for rank, failure in failures.items() if failure.exitcode == code}


def _other_codes(failures: dict[int, ProcessFailure]) -> dict[int, ProcessFailure]:
    return {rank: failure for rank, failure in failures.items() if failure.exitcode != EXIT_STOPPED}


def _outcome(chosen: dict[int, ProcessFailure], failures: dict[int, ProcessFailure]) -> Outcome:
    rank = min(chosen, key=lambda rank: (chosen[rank].timestamp, rank))
    failure = chosen[rank]
    code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    line = told_line(failure.message)
    if line is None:
        # It could not say why, but other ranks may have noticed. One that did not notice speaks of its own end.
        others = [told_line(other.message) or "" for other in failures.values()]
        named = re.compile(rf"\brank ({'|'.join(map(str, chosen))})\b")
        line = next(filter(named.search, others), None) or _describe_end(rank, failure)
    return Outcome(code, line)


def _describe_end(rank: int, failure: ProcessFailure) -> str:
    code, message = failure.exitcode, cast(Any, failure.message)
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
        return f"distrain: rank {rank} was ended by {name}{hint}"
    if isinstance(message, dict) and "message" in message:
        # A function that raised an error; torch has written it down.
        return f"distrain: rank {rank} failed: {message['message']}"
    return f"distrain: rank {rank} ended with exit code {code} and did not say why"
