"""Which network interface a rank uses, and which one leads to the other hosts."""

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

#: Linux's ioctl request for an interface's IPv4 address.
_SIOCGIFADDR = 0x8915
#: Seconds after which a name counts as unresolvable; a dead name server takes much longer to fail.
_RESOLVE_SECONDS = 5.0
#: An address reserved for documentation. The route to it starts at the interface that leads out of this host.
_OUTSIDE_ADDRESS = "192.0.2.1"


@dataclass(frozen=True)
class InterfaceChoice:
    """The interface that gloo uses on this host, by torch's own rules.

    Attributes:
        interface: Its name; empty if none was found.
        address: Its address; empty if it has none.
        why: Why gloo uses it, worded as the end of a sentence.
    """

    interface: str
    address: str
    why: str


@dataclass(frozen=True)
class ResolvedName:
    """Result of looking up a host name.

    Attributes:
        address: The first address; empty if the name does not resolve.
        error: Why the name does not resolve.
    """

    address: str
    error: str = ""


def addresses() -> dict[str, str]:
    """Returns the address of each interface of this host by name, IPv4 where it has both IPv4 and IPv6."""
    by_name = dict(_ipv6_addresses())
    if sys.platform == "linux":
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                # Fails for an interface without an IPv4 address.
                with contextlib.suppress(OSError):
                    by_name[name] = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    return by_name


def _ipv6_addresses() -> list[tuple[str, str]]:
    table = Path("/proc/net/if_inet6")
    if not table.exists():
        return []
    rows = [line.split() for line in table.read_text().splitlines()]
    # Addresses of scope 20 are link-local: they work only together with an interface name.
    return [
        (name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
        for digits, _, _, scope, _, name in rows
        if scope != "20"
    ]


def resolve(name: str, timeout: float = _RESOLVE_SECONDS) -> ResolvedName:
    """Asks the system for a name's address, and gives up after ``timeout`` seconds."""
    answer: list[ResolvedName] = []

    def ask() -> None:
        try:
            results = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            answer.append(ResolvedName(str(results[0][4][0])))
        except (OSError, UnicodeError) as error:
            answer.append(ResolvedName("", getattr(error, "strerror", None) or str(error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0] if answer else ResolvedName("", f"no answer within {timeout:g} s")


def gloo_choice(environment: Mapping[str, str] = os.environ) -> InterfaceChoice:
    """Returns the interface that gloo binds to.

    gloo takes the interface that ``GLOO_SOCKET_IFNAME`` names, else the one that the host's own name resolves to, else
    the loopback. See ``ProcessGroupGloo::createDefaultDevice`` in torch.
    """
    here = addresses()
    requested = environment.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if requested:
        if requested not in here:
            why = f"GLOO_SOCKET_IFNAME={requested} names no interface of this host that has an address"
            return InterfaceChoice(requested, "", why)
        return InterfaceChoice(requested, here[requested], f"GLOO_SOCKET_IFNAME={requested}")
    host = socket.gethostname()
    resolved = resolve(host)
    loopback = interface_of("127.0.0.1", here)
    if not resolved.address:
        why = f"its own name '{host}' doesn't resolve ({resolved.error}), so gloo takes the loopback"
        return InterfaceChoice(loopback, "127.0.0.1", why)
    name = interface_of(resolved.address, here)
    if not name:
        why = (
            f"its own name '{host}' resolves to {resolved.address}, which is no address of this host, so gloo takes "
            "the loopback"
        )
        return InterfaceChoice(loopback, "127.0.0.1", why)
    return InterfaceChoice(name, resolved.address, f"its own name '{host}' resolves to {resolved.address}")


def nccl_choices(here: Mapping[str, str], requested: str | None = None) -> list[str]:
    """Returns the interfaces that NCCL may take, as its documentation of ``NCCL_SOCKET_IFNAME`` describes.

    Args:
        here: Address of each interface, by name.
        requested: Value of ``NCCL_SOCKET_IFNAME``; by default the environment's.
    """
    requested = os.environ.get("NCCL_SOCKET_IFNAME", "") if requested is None else requested
    if not requested:
        usual = [name for name, address in here.items() if not is_loopback(address) and not name.startswith("docker")]
        return usual or list(here)
    words = requested.removeprefix("^").removeprefix("=").split(",")
    exact, excluded = requested.removeprefix("^").startswith("="), requested.startswith("^")

    def matches(name: str) -> bool:
        return any(name == word if exact else name.startswith(word) for word in words)

    return [name for name in here if matches(name) != excluded]


def interface_of(address: str, here: Mapping[str, str]) -> str:
    """Returns the name of the interface with an address; empty if none has it."""
    exact = next((name for name, own in here.items() if own == address), "")
    # The loopback answers to all of 127.0.0.0/8.
    return exact or next((name for name, own in here.items() if is_loopback(address) and is_loopback(own)), "")


def is_loopback(address: str) -> bool:
    """Whether an address is a loopback address, which other hosts cannot reach."""
    return address == "::1" or address.startswith("127.")


def source_address(target: str = _OUTSIDE_ADDRESS) -> str:
    """Returns the address that this host would send from to reach ``target``; empty without a route.

    Sends nothing.
    """
    try:
        family, kind, _, _, destination = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(destination)
            return str(probe.getsockname()[0])
    except OSError:
        return ""
