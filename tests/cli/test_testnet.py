"""``launch/testnet.py``: its settings and its messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distrain.cli import testnet
from distrain.cli.testnet import NetworkSettings
from distrain.errors import ConfigError
from distrain.tools.testnet import network
from distrain.tools.testnet.network import VirtualNetwork
from tests.harness import HANG_SECONDS
from tests.hosts import needs_network

LAUNCHER = Path(__file__).parents[2] / "launch" / "testnet.py"


def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LAUNCHER), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env={**os.environ, "HYDRA_FULL_ERROR": "0"},
    )


def settings(**changes: object) -> NetworkSettings:
    made = NetworkSettings("up", 2, None, None, None, None, 0)
    for key, value in changes.items():
        setattr(made, key, value)
    return made


@pytest.mark.parametrize(("text", "value"), [("10ms", 0.01), ("0.5s", 0.5), ("200us", 2e-4), (None, 0.0)])
def test_times_have_units(text: str | None, value: float) -> None:
    assert testnet.parse_seconds("delay", text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["10", "ms", "-1ms", "1h", "1e3ms"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^delay={text}: must be a time like 10ms"):
        testnet.parse_seconds("delay", text)


def test_share_is_in_percent() -> None:
    assert testnet.parse_share("loss", "0.1%") == pytest.approx(0.001)
    assert testnet.parse_share("loss", "100%") == 1.0
    for text in ("0.1", "101%", "%", "-1%"):
        with pytest.raises(ConfigError, match=f"^loss={text}: must be a share"):
            testnet.parse_share("loss", text)


def test_rendezvous_puts_the_first_host_first() -> None:
    found = [network.rendezvous_variables(host, 12) for host in range(12)]
    # torchrun ranks hosts by their addresses, as text.
    assert sorted(each["PET_LOCAL_ADDR"] for each in found) == [each["PET_LOCAL_ADDR"] for each in found]
    assert [each["PET_RDZV_CONF"] for each in found] == ["is_host=1"] + 11 * ["is_host=0"]
    assert {each["PET_RDZV_ENDPOINT"] for each in found} == {f"{network.address(0)}:29500"}
    assert [each["RANK"] for each in found] == [str(host) for host in range(12)]


def test_missing_root_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^testnet: a test network needs root") as refused:
        testnet.run(settings(), ["true"])
    assert "\n" not in str(refused.value)


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("distrain.tools.testnet.network.shutil.which", lambda tool: None if tool == "tc" else tool)
    assert (
        network.unavailable_reason()
        == "a test network needs tc, from the packages iproute2, util-linux, mount and hostname"
    )


def test_command_on_a_network_that_is_not_up_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^name=nowhere: no such test network is up"):
        testnet.run(settings(action="on", name="nowhere"), ["true"])


@needs_network
def test_command_runs_on_every_host_and_the_failed_host_is_named() -> None:
    # The launcher's own HYDRA_FULL_ERROR is not passed to the command.
    done = typed(
        "hosts=3", "--", "sh", "-c", "echo $RANK of $WORLD_SIZE $HYDRA_FULL_ERROR; test $(hostname) != host1 || exit 9"
    )
    assert sorted(done.stdout.splitlines()) == ["host0 | 0 of 3 0", "host1 | 1 of 3 0", "host2 | 2 of 3 0"]
    assert done.stderr == "host1 | ended with exit code 9\n"
    assert done.returncode == 9


@needs_network
def test_links_have_the_requested_properties() -> None:
    script = "test $(hostname) = host0 && tc qdisc show dev eth0 || true"
    done = typed("hosts=2", "rate=100mbit", "delay=1ms", "loss=0.1%", "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert "tbf" in done.stdout
    assert "rate 100Mbit" in done.stdout


def test_invalid_setting_is_refused_in_one_line() -> None:
    done = typed("hosts=0")
    assert done.returncode == 2
    assert done.stderr == "distrain: hosts=0: must be at least 1\n"


@needs_network
def test_rate_that_tc_refuses_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"^rate=fast: tc refuses this rate; write 100mbit or 1gbit"):
        testnet.run(settings(rate="fast"), ["true"])


@needs_network
def test_on_runs_the_command_on_one_host() -> None:
    name = f"standing-{os.getpid()}"
    with VirtualNetwork(2, name=name):
        done = typed("on", f"name={name}", "host=1", "--", "sh", "-c", "hostname; echo $PET_RDZV_ENDPOINT; exit 4")
        assert done.stdout.splitlines() == ["host1", f"{network.address(0)}:29500"]
        assert done.returncode == 4
        with pytest.raises(ConfigError, match=rf"^host=2: {name} has hosts 0 to 1"):
            testnet.run(settings(action="on", name=name, host=2), ["true"])
