"""``launch/testnet.py``: runs a command on every host of a test network, or keeps one up to run commands on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from distrain.config.schema import setting
from distrain.errors import ConfigError, missing
from distrain.tools.testnet import network
from distrain.tools.testnet.network import Network, host_name

#: Seconds that commands get to end after a signal before they are killed; torchrun's own for its ranks is 30.
_GRACE = 40.0
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass
class NetworkSettings:
    """Keys of ``launch/testnet.py``."""

    action: str = setting(
        "up: make a network; on: run a command on a host; down: end networks.", choices=("up", "on", "down")
    )
    hosts: int = setting("How many hosts.", at_least=1, at_most=154)
    rate: str | None = setting("What each host may send, like 100mbit or 1gbit; null: no limit.")
    delay: str | None = setting("What each packet takes from host to host, like 10ms; null: none.")
    loss: str | None = setting("Share of packets that don't arrive, like 0.1%; null: none.")
    name: str | None = setting("What the network is called; null: a number for up, the only one for on, all for down.")
    host: int = setting("on: which host, counted from 0.", at_least=0)


class _Stopped(Exception):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(settings: NetworkSettings, command: Sequence[str]) -> int:
    """Does what the settings say.

    Args:
        settings: The command line before ``--``.
        command: What stands behind it.

    Returns:
        The exit code: the command's on the first host where it failed, as shells count.

    Raises:
        ConfigError: A setting can't be used, or this machine can't make networks.
    """
    if settings.action == "down":
        ended = network.down(settings.name)
        print(f"ended: {', '.join(ended)}" if ended else "there is no such test network", flush=True)
        return 0
    if settings.action == "on":
        _replace(settings, command)
    delay, loss = seconds("delay", settings.delay), share("loss", settings.loss)
    if settings.name in network.running():
        raise ConfigError("name", settings.name, "a test network of this name is up")
    with _stoppable(), contextlib.ExitStack() as stack:
        try:
            net = _made(stack, Network(settings.hosts, delay=delay, loss=loss, name=settings.name))
            if settings.rate is not None:
                _limit(net, settings.rate)
            return _everywhere(net, command) if command else _hold(net)
        except _Stopped as stopped:
            return 128 + stopped.number


def seconds(key: str, text: str | None) -> float:
    """A time like ``10ms``, in seconds.

    Raises:
        ConfigError: It is none.
    """
    if text is None:
        return 0.0
    found = re.fullmatch(r"(\d+\.?\d*)(s|ms|us)", text)
    if found is None:
        raise ConfigError(key, text, "must be a time like 10ms, 0.5s or 200us")
    return float(found[1]) * _UNITS[found[2]]


def share(key: str, text: str | None) -> float:
    """A share like ``0.1%``, as a number from 0 to 1.

    Raises:
        ConfigError: It is none.
    """
    if text is None:
        return 0.0
    found = re.fullmatch(r"(\d+\.?\d*)%", text)
    if found is None or float(found[1]) > 100:
        raise ConfigError(key, text, "must be a share of the packets like 0.1%")
    return float(found[1]) / 100


def _made(stack: contextlib.ExitStack, net: Network) -> Network:
    try:
        return stack.enter_context(net)
    except RuntimeError as error:
        raise missing("testnet", str(error)) from error


def _limit(net: Network, rate: str) -> None:
    try:
        net.limit(rate)
    except RuntimeError as error:
        raise ConfigError("rate", rate, f"tc refuses it, which wants 100mbit or 1gbit ({error})") from error


def _replace(settings: NetworkSettings, command: Sequence[str]) -> NoReturn:
    """Becomes the command on a host of a network that is up."""
    up = network.running()
    name = settings.name
    if name is None and len(up) == 1:
        name = next(iter(up))
    if name not in up:
        raise ConfigError("name", name, "no such test network is up", sorted(up))
    hosts = len(up[name]) - 1
    if settings.host >= hosts:
        raise ConfigError("host", settings.host, f"{name} has hosts 0 to {hosts - 1}")
    if not command:
        raise missing("command", "write what to run after two dashes: testnet.py on host=0 -- COMMAND")
    os.environ.update({"GLOO_SOCKET_IFNAME": "eth0", **network.rendezvous(settings.host, hosts)})
    line = network.command_on(up[name][host_name(settings.host)], command)
    os.execv(line[0], line)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    def stop(number: int, _: FrameType | None) -> None:
        raise _Stopped(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _hold(net: Network) -> int:
    print(
        f"test network {net.name}: {', '.join(f'{host_name(host)} {net.address(host)}' for host in range(net.hosts))}\n"
        f"run there: python launch/testnet.py on name={net.name} host=0 -- COMMAND\n"
        "it ends with this process (Ctrl-C)",
        flush=True,
    )
    while True:
        signal.pause()


def _everywhere(net: Network, command: Sequence[str]) -> int:
    """Runs the command on every host, with its lines behind the host's name."""
    processes = [net.start(host, command) for host in range(net.hosts)]
    mouth = threading.Lock()
    printers = [
        threading.Thread(target=_print, args=(host_name(host), process, mouth), daemon=True)
        for host, process in enumerate(processes)
    ]
    for printer in printers:
        printer.start()
    try:
        for process in processes:
            process.wait()
    except _Stopped as stopped:
        for process in processes:
            if process.poll() is None:
                process.send_signal(stopped.number)
        limit = time.monotonic() + _GRACE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, limit - time.monotonic()))
        raise
    finally:
        # What they left behind on a host may hold their output open; it ends with the network.
        for printer in printers:
            printer.join(1)
    codes = [process.returncode for process in processes]
    for host, code in enumerate(codes):
        if code:
            print(f"{host_name(host)} | ended with {_told(code)}", file=sys.stderr, flush=True)
    worst = next((code for code in codes if code), 0)
    return 128 - worst if worst < 0 else worst


def _told(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"


def _print(host: str, process: subprocess.Popen[bytes], mouth: threading.Lock) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        # A progress bar returns to the start of its line.
        text = line.decode(errors="replace").rstrip().rpartition("\r")[2]
        with mouth:
            print(f"{host} | {text}", flush=True)
