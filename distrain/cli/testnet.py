"""``distrain testnet``: makes a test network, runs a command on every host, or keeps the network up for commands."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from distrain.cli.typed_help import as_started
from distrain.config.setting import setting
from distrain.errors import ConfigError, config_error
from distrain.files.escaping import Lines
from distrain.files.terminal import print_to_stderr, show
from distrain.tools.testnet import network
from distrain.tools.testnet.network import VirtualNetwork, host_name

#: Seconds between forwarding a signal and killing the commands. torchrun gives its ranks 30.
_GRACE_SECONDS = 40.0
#: The folder of the command's YAML file. It is not in ``conf/``, where ``loss=`` chooses a loss function.
CONF = Path(network.__file__).parent / "conf"
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass
class NetworkSettings:
    """Keys of ``distrain testnet``."""

    action: str = setting(
        "up: make a network; on: run a command on a host; down: end networks.", choices=("up", "on", "down")
    )
    hosts: int = setting("Number of hosts.", at_least=1, at_most=154)
    rate: str | None = setting("Rate at which each host can send, like 100mbit or 1gbit; null: no limit.")
    delay: str | None = setting("Delay of each packet from host to host, like 10ms; null: none.")
    loss: str | None = setting("Share of packets that are dropped, like 0.1%; null: none.")
    name: str | None = setting(
        "Name of the network; null: a number for up, the only network for on, all networks for down."
    )
    host: int = setting("on: number of the host, from 0.", at_least=0)


class _SignalReceived(Exception):
    """A signal that asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(settings: NetworkSettings, command: Sequence[str]) -> int:
    """Carries out ``action``.

    Args:
        settings: The command line before ``--``.
        command: The command line after ``--``.

    Returns:
        The exit code: that of the first host on which the command failed (128 + number for a signal), else 0.

    Raises:
        ConfigError: A setting is invalid, or this machine can't make networks.
    """
    if settings.action == "down":
        removed = network.shut_down(settings.name)
        show(f"ended: {', '.join(removed)}" if removed else "there is no such test network")
        return 0
    if settings.action == "on":
        _exec_on_host(settings, command)
    delay, loss = parse_seconds("delay", settings.delay), parse_share("loss", settings.loss)
    if settings.name in network.running_networks():
        raise ConfigError("name", settings.name, "a test network of this name is up")
    with _signals_as_exceptions(), contextlib.ExitStack() as stack:
        try:
            net = _enter_network(stack, VirtualNetwork(settings.hosts, delay=delay, loss=loss, name=settings.name))
            if settings.rate is not None:
                _set_rate(net, settings.rate)
            return _run_on_all(net, command) if command else _wait_for_signal(net)
        except _SignalReceived as received:
            return 128 + received.number


def parse_seconds(key: str, text: str | None) -> float:
    """Converts a time like ``10ms`` to seconds.

    Raises:
        ConfigError: The text is not such a time.
    """
    if text is None:
        return 0.0
    match = re.fullmatch(r"(\d+\.?\d*)(s|ms|us)", text)
    if match is None:
        raise ConfigError(key, text, "must be a time like 10ms, 0.5s or 200us")
    return float(match[1]) * _UNITS[match[2]]


def parse_share(key: str, text: str | None) -> float:
    """Converts a share like ``0.1%`` to a number from 0 to 1.

    Raises:
        ConfigError: The text is not such a share.
    """
    if text is None:
        return 0.0
    match = re.fullmatch(r"(\d+\.?\d*)%", text)
    if match is None or float(match[1]) > 100:
        raise ConfigError(key, text, "must be a share of the packets like 0.1%")
    return float(match[1]) / 100


def _enter_network(stack: contextlib.ExitStack, net: VirtualNetwork) -> VirtualNetwork:
    try:
        return stack.enter_context(net)
    except RuntimeError as error:
        raise config_error("testnet", str(error)) from error


def _set_rate(net: VirtualNetwork, rate: str) -> None:
    try:
        net.set_rate(rate)
    except RuntimeError as error:
        raise ConfigError("rate", rate, f"tc refuses this rate; write 100mbit or 1gbit ({error})") from error


def _exec_on_host(settings: NetworkSettings, command: Sequence[str]) -> NoReturn:
    """Replaces this process by the command, on a host of a running network."""
    up = network.running_networks()
    name = settings.name
    if name is None and len(up) == 1:
        name = next(iter(up))
    if name not in up:
        raise ConfigError("name", name, "no such test network is up", sorted(up))
    hosts = len(up[name]) - 1
    if settings.host >= hosts:
        raise ConfigError("host", settings.host, f"{name} has hosts 0 to {hosts - 1}")
    if not command:
        hint = as_started("write the command after two dashes: distrain testnet on host=0 -- COMMAND")
        raise config_error("command", hint)
    os.environ.update({"GLOO_SOCKET_IFNAME": "eth0", **network.rendezvous_variables(settings.host, hosts)})
    line = network.command_inside(up[name][host_name(settings.host)], command)
    os.execv(line[0], line)


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    def stop(number: int, _: FrameType | None) -> None:
        raise _SignalReceived(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _wait_for_signal(net: VirtualNetwork) -> int:
    hosts = ", ".join(f"{host_name(host)} {net.address(host)}" for host in range(net.hosts))
    lines = [
        f"test network {net.name}: {hosts}",
        as_started(f"run there: distrain testnet on name={net.name} host=0 -- COMMAND"),
        "it ends with this process (Ctrl-C)",
    ]
    show(Lines.of(lines))
    while True:
        signal.pause()


def _run_on_all(net: VirtualNetwork, command: Sequence[str]) -> int:
    """Runs the command on every host and prints its output, each line behind the host's name."""
    processes = [net.start(host, command) for host in range(net.hosts)]
    lock = threading.Lock()
    printers = [
        threading.Thread(target=_print_lines, args=(host_name(host), process, lock), daemon=True)
        for host, process in enumerate(processes)
    ]
    for printer in printers:
        printer.start()
    try:
        for process in processes:
            process.wait()
    except _SignalReceived as received:
        for process in processes:
            if process.poll() is None:
                process.send_signal(received.number)
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        raise
    finally:
        # A process left behind on a host may keep the output open; it is killed with the network.
        for printer in printers:
            printer.join(1)
    codes = [process.returncode for process in processes]
    for host, code in enumerate(codes):
        if code:
            print_to_stderr(f"{host_name(host)} | ended with {_describe_exit(code)}")
    failed = next((code for code in codes if code), 0)
    return 128 - failed if failed < 0 else failed


def _describe_exit(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"


def _print_lines(host: str, process: subprocess.Popen[bytes], lock: threading.Lock) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        # Of a progress bar, which rewrites its line, only the last state is printed.
        text = line.decode(errors="replace").rstrip().rpartition("\r")[2]
        with lock:
            print(f"{host} | {text}", flush=True)
