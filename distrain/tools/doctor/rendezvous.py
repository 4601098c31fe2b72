"""Where the doctor's ranks meet: a TCP store with short timeouts, and clear messages when it cannot be reached."""

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

from distrain.errors import first_line
from distrain.runtime.bind_address import within_time
from distrain.runtime.world import World
from distrain.tools.doctor import interfaces

#: What a user should know about each error of a connection.
_ERROR_MEANINGS = {
    errno.ECONNREFUSED: "refused: nobody listens there, or a firewall rejects",
    errno.ETIMEDOUT: "no answer: a firewall drops packets, or the host is down",
    errno.EHOSTUNREACH: "no route to that host",
    errno.ENETUNREACH: "no route to that network",
    errno.EINVAL: "this host's own rules forbid it",
    errno.EACCES: "this host's own rules forbid it",
    errno.EADDRNOTAVAIL: "no such address",
}


class RendezvousFailed(Exception):
    """This rank cannot reach the rendezvous.

    Attributes:
        kind: Kind of the :class:`distrain.tools.doctor.findings.Finding` to report.
        problem: What is wrong.
        advice: What to type or where to look.
    """

    def __init__(self, kind: str, problem: str, advice: str) -> None:
        super().__init__(problem)
        self.kind, self.problem, self.advice = kind, problem, advice


def describe_connection_error(error: OSError) -> str:
    """Explains to a user why a connection failed."""
    if isinstance(error, TimeoutError):
        return _ERROR_MEANINGS[errno.ETIMEDOUT]
    return _ERROR_MEANINGS.get(error.errno or 0, error.strerror or str(error))


class DoctorRendezvous:
    """Exchanges JSON values among the doctor's ranks through a store that rank 0 serves.

    Args:
        world: This rank's place among all ranks.
        address: Name or address of the host where ranks meet.
        port: Port of the store on that host.
        timeout: Seconds to wait for the other ranks.

    Raises:
        RendezvousFailed: This rank cannot reach the store.

    Attributes:
        store: The store, under a prefix of the doctor's own.
        present: The ranks that arrived in time according to rank 0; equal on all ranks.
    """

    def __init__(self, world: World, address: str, port: int, timeout: float) -> None:
        self._world, self._timeout = world, timeout
        self.present: Sequence[int] = ()
        # Under torchrun the agent already serves a store.
        serves = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        resolved = interfaces.resolve(address)
        if not resolved.address:
            raise RendezvousFailed(
                "host name",
                f"the name '{address}', where ranks meet, doesn't resolve ({resolved.error})",
                f"give its address instead of the name, or add a line 'ADDRESS {address}' to /etc/hosts",
            )
        if not serves:
            _wait_until_reachable(address, resolved.address, port, timeout)
        try:
            store = within_time(
                lambda: TCPStore(
                    resolved.address,
                    port,
                    world.size,
                    is_master=serves,
                    timeout=datetime.timedelta(seconds=timeout),
                    wait_for_workers=False,
                ),
                timeout,
            )
        except (RuntimeError, TimeoutError) as error:
            problem = f"can't serve port {port}" if serves else f"port {port} of {address} answers, but is no store"
            raise RendezvousFailed(
                "closed port",
                f"{problem}: {first_line(error)}",
                "choose another port; ss -ltnp shows which process has this one",
            ) from error
        self.store = PrefixStore("distrain/doctor", store)

    def gather(self, value: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Waits for all ranks up to rank 0's timeout, and exchanges a first value; must be the first call.

        Returns:
            The value of each rank that arrived, in order of rank.

        Raises:
            RendezvousFailed: Rank 0 did not arrive.
        """
        self.store.set(f"here/{self._world.rank}", json.dumps(value))
        if self._world.rank == 0:
            deadline = time.monotonic() + self._timeout
            arrived = [
                rank for rank in range(self._world.size) if self._wait(f"here/{rank}", deadline - time.monotonic())
            ]
            self.store.set("present", json.dumps(arrived))
        # Rank 0 may have started later than this rank, so it gets twice the time.
        elif not self._wait("present", 2 * self._timeout):
            raise RendezvousFailed(
                "missing rank",
                f"rank 0 never arrived within {2 * self._timeout:g} s",
                "check on its host that the command was started with rank 0, and read its output",
            )
        self.present = json.loads(self.store.get("present"))
        return {rank: json.loads(self.store.get(f"here/{rank}")) for rank in self.present}

    def all_gather(self, topic: str, value: Any, timeout: float) -> dict[int, Any]:
        """Exchanges a value among the present ranks.

        Args:
            topic: Name of the exchange; each name can be used once.
            value: This rank's value.
            timeout: Seconds to wait for the others.

        Returns:
            The value of each rank that answered in time, in order of rank.
        """
        self.store.set(f"{topic}/{self._world.rank}", json.dumps(value))
        deadline = time.monotonic() + timeout
        return {
            rank: json.loads(self.store.get(f"{topic}/{rank}"))
            for rank in self.present
            if self._wait(f"{topic}/{rank}", deadline - time.monotonic())
        }

    def leave(self, timeout: float) -> None:
        """Announces that this rank no longer needs the store; rank 0, which may serve it, waits for the others."""
        self.store.set(f"left/{self._world.rank}", "")
        if self._world.rank == 0:
            deadline = time.monotonic() + timeout
            for rank in self.present:
                self._wait(f"left/{rank}", deadline - time.monotonic())

    def _wait(self, key: str, seconds: float) -> bool:
        with contextlib.suppress(dist.DistError):
            self.store.wait([key], datetime.timedelta(seconds=max(seconds, 0.05)))
            return True
        return False


def _wait_until_reachable(name: str, address: str, port: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=max(left, 0.1)):
                return
        except OSError as error:
            # The serving rank may start later than this one.
            if left <= 0 or error.errno != errno.ECONNREFUSED:
                shown = name if name == address else f"{name} ({address})"
                raise RendezvousFailed(
                    "closed port",
                    f"can't reach port {port} of {shown}, where ranks meet, within {timeout:g} s: "
                    f"{describe_connection_error(error)}",
                    f"is rank 0 started there? if so, open TCP port {port} on that host "
                    "(ss -ltnp shows what listens, nft list ruleset or iptables -L what is dropped)",
                ) from error
            time.sleep(0.1)
