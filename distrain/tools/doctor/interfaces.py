"""Which network interface a rank uses, and which it should."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Linux's request for an interface's IPv4 address.
_SIOCGIFADDR = 0x8915
#: Seconds after which a name counts as one that doesn't resolve; a dead name server takes much longer.
_PATIENCE = 5.0
#: Reserved for documentation: what the route to it starts from is the interface that leads out.
_ELSEWHERE = "192.0.2.1"


@dataclass(frozen=True)
class Choice:
    """What gloo uses on this host, by torch's own rules.

    Attributes:
        interface: Its name; empty where none could be found.
        address: Its address; empty where there is none.
        why: The reason, as the end of a sentence.
    """

    interface: str
    address: str
    why: str


@dataclass(frozen=True)
class Resolved:
    """What a name leads to.

    Attributes:
        address: The first address; empty where there is none.
        error: Why there is none.
    """

    address: str
    error: str = ""


def addresses() -> dict[str, str]:
    """Name and address of each interface of this host that has one, IPv4 where it has both."""
    found = dict(_ipv6())
    if sys.platform == "linux":
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                # It has no IPv4 address.
                with contextlib.suppress(OSError):
                    found[name] = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    return found


def _ipv6() -> list[tuple[str, str]]:
    table = Path("/proc/net/if_inet6")
    if not table.exists():
        return []
    rows = [line.split() for line in table.read_text().splitlines()]
    # Scope 20 is the link's own, which needs the interface's name beside it.
    return [
        (name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
        for digits, _, _, scope, _, name in rows
        if scope != "20"
    ]


def resolve(name: str, patience: float = _PATIENCE) -> Resolved:
    """Asks the system for a name's address, and gives up in time."""
    answer: list[Resolved] = []

    def ask() -> None:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            answer.append(Resolved(str(found[0][4][0])))
        except (OSError, UnicodeError) as error:
            answer.append(Resolved("", getattr(error, "strerror", None) or str(error)))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience)
    return answer[0] if answer else Resolved("", f"no answer within {patience:g} s")


def gloo_choice(environment: Mapping[str, str] = os.environ) -> Choice:
    """What gloo binds to: the interface that is named, else what the host's own name leads to, else the loopback.

    This is ``ProcessGroupGloo::createDefaultDevice`` of torch.
    """
    here = addresses()
    named = environment.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if named:
        if named not in here:
            return Choice(named, "", f"GLOO_SOCKET_IFNAME={named} names no interface with an address here")
        return Choice(named, here[named], f"GLOO_SOCKET_IFNAME={named}")
    host = socket.gethostname()
    found = resolve(host)
    if not found.address:
        loopback = Choice(interface_of("127.0.0.1", here), "127.0.0.1", "")
        why = f"its own name '{host}' doesn't resolve ({found.error}), so gloo takes the loopback"
        return Choice(loopback.interface, loopback.address, why)
    name = interface_of(found.address, here)
    if not name:
        why = (
            f"its own name '{host}' leads to {found.address}, which is no address of this host: gloo takes the loopback"
        )
        return Choice(interface_of("127.0.0.1", here), "127.0.0.1", why)
    return Choice(name, found.address, f"its own name '{host}' leads to {found.address}")


def nccl_choices(here: Mapping[str, str], named: str | None = None) -> list[str]:
    """The interfaces that NCCL may take, by its documentation of ``NCCL_SOCKET_IFNAME``: it takes the first it finds.

    Args:
        here: Addresses by interface.
        named: What the variable says; by default the environment's.
    """
    named = os.environ.get("NCCL_SOCKET_IFNAME", "") if named is None else named
    if not named:
        usual = [name for name, address in here.items() if not is_loopback(address) and not name.startswith("docker")]
        return usual or list(here)
    words = named.removeprefix("^").removeprefix("=").split(",")
    exact, unwanted = named.removeprefix("^").startswith("="), named.startswith("^")

    def matches(name: str) -> bool:
        return any(name == word if exact else name.startswith(word) for word in words)

    return [name for name in here if matches(name) != unwanted]


def interface_of(address: str, here: Mapping[str, str]) -> str:
    """The interface with an address; empty where none has it."""
    found = next((name for name, own in here.items() if own == address), "")
    # The loopback answers to all of 127.0.0.0/8.
    return found or next((name for name, own in here.items() if is_loopback(address) and is_loopback(own)), "")


def is_loopback(address: str) -> bool:
    """Whether an address leads nowhere but to its own host."""
    return address == "::1" or address.startswith("127.")


def towards(target: str = _ELSEWHERE) -> str:
    """This host's address on the way to another address; empty where no way leads there. Sends nothing."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError:
        return ""
