"""Where ranks of the doctor meet: the job's own store, with short limits and words for what keeps them from it."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from distrain.runtime.world import World
from distrain.tools.doctor import interfaces

#: What a connection's error means to its user.
_MEANINGS = {
    errno.ECONNREFUSED: "refused: nobody listens there, or a firewall rejects",
    errno.ETIMEDOUT: "no answer: a firewall drops packets, or the host is down",
    errno.EHOSTUNREACH: "no route to that host",
    errno.ENETUNREACH: "no route to that network",
    errno.EINVAL: "this host's own rules forbid it",
    errno.EACCES: "this host's own rules forbid it",
    errno.EADDRNOTAVAIL: "no such address",
}


class NoMeeting(Exception):
    """This rank can't reach the place where ranks meet.

    Attributes:
        kind: As of a :class:`distrain.tools.doctor.findings.Finding`.
        problem: What is wrong.
        advice: What to type or to look at.
    """

    def __init__(self, kind: str, problem: str, advice: str) -> None:
        super().__init__(problem)
        self.kind, self.problem, self.advice = kind, problem, advice


def meaning(error: OSError) -> str:
    """Why a connection failed, for people."""
    if isinstance(error, TimeoutError):
        return _MEANINGS[errno.ETIMEDOUT]
    return _MEANINGS.get(error.errno or 0, error.strerror or str(error))


class Meeting:
    """All ranks that came, and what they tell each other.

    Args:
        world: This rank's place.
        address: Name or address of the host where ranks meet.
        port: At which port.
        patience: Seconds to wait for the others.

    Raises:
        NoMeeting: This rank can't get there.

    Attributes:
        present: The ranks that came in time, as rank 0 saw it; equal on all of them.
    """

    def __init__(self, world: World, address: str, port: int, patience: float) -> None:
        self._world, self._patience = world, patience
        self.present: Sequence[int] = ()
        serves = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        found = interfaces.resolve(address)
        if not found.address:
            raise NoMeeting(
                "host name",
                f"the name '{address}', where ranks meet, doesn't resolve ({found.error})",
                f"give its address instead of the name, or add a line 'ADDRESS {address}' to /etc/hosts",
            )
        if not serves:
            _reach(address, found.address, port, patience)
        try:
            store = TCPStore(
                found.address,
                port,
                world.size,
                is_master=serves,
                timeout=datetime.timedelta(seconds=patience),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            line = str(error).strip().splitlines()[0]
            problem = f"can't serve port {port}" if serves else f"port {port} of {address} answers, but is no store"
            raise NoMeeting(
                "closed port", f"{problem}: {line}", "choose another port; ss -ltnp shows who has this one"
            ) from error
        self.store = PrefixStore("distrain/doctor", store)

    def gather(self, mine: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """The first exchange: waits for all ranks, as long as rank 0 has patience.

        Returns:
            What each rank that came gave, in order of rank.

        Raises:
            NoMeeting: Rank 0 did not come.
        """
        self.store.set(f"here/{self._world.rank}", json.dumps(mine))
        if self._world.rank == 0:
            deadline = time.monotonic() + self._patience
            came = [rank for rank in range(self._world.size) if self._wait(f"here/{rank}", deadline - time.monotonic())]
            self.store.set("present", json.dumps(came))
        # Rank 0 may have come later than this one.
        elif not self._wait("present", 2 * self._patience):
            raise NoMeeting(
                "missing rank",
                f"rank 0 never arrived within {2 * self._patience:g} s",
                "look on its host whether the command was started there, with rank 0, and what it says",
            )
        self.present = json.loads(self.store.get("present"))
        return {rank: json.loads(self.store.get(f"here/{rank}")) for rank in self.present}

    def share(self, topic: str, mine: Any, patience: float) -> dict[int, Any]:
        """What each present rank gives under a topic; one that is silent for ``patience`` seconds is left out."""
        self.store.set(f"{topic}/{self._world.rank}", json.dumps(mine))
        deadline = time.monotonic() + patience
        return {
            rank: json.loads(self.store.get(f"{topic}/{rank}"))
            for rank in self.present
            if self._wait(f"{topic}/{rank}", deadline - time.monotonic())
        }

    def leave(self, patience: float) -> None:
        """Tells that this rank needs the store no more; rank 0, which may serve it, waits for the others."""
        self.store.set(f"left/{self._world.rank}", "")
        if self._world.rank == 0:
            deadline = time.monotonic() + patience
            for rank in self.present:
                self._wait(f"left/{rank}", deadline - time.monotonic())

    def _wait(self, key: str, seconds: float) -> bool:
        with contextlib.suppress(dist.DistError):
            self.store.wait([key], datetime.timedelta(seconds=max(seconds, 0.05)))
            return True
        return False


def _reach(name: str, address: str, port: int, patience: float) -> None:
    """Waits until somebody listens there."""
    deadline = time.monotonic() + patience
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=max(left, 0.1)):
                return
        except OSError as error:
            # Who serves may come later than this rank.
            if left <= 0 or error.errno != errno.ECONNREFUSED:
                shown = name if name == address else f"{name} ({address})"
                raise NoMeeting(
                    "closed port",
                    f"can't reach port {port} of {shown}, where ranks meet, within {patience:g} s: {meaning(error)}",
                    f"is rank 0 started there? if so, open TCP port {port} on that host "
                    "(ss -ltnp shows who listens, nft list ruleset or iptables -L what is dropped)",
                ) from error
            time.sleep(0.1)
