"""``distrain verify``: what it refuses, and its command."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from distrain.cli.verify import check, print_certificate, training_config
from distrain.errors import ConfigError, Failed
from distrain.runtime.world import World
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.verification import engine
from distrain.verification.certificate import DIFFERENT, EQUAL, Certificate
from distrain.verification.engine import EXAMPLE
from tests.runs import SMALL


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("strategy=dpp",), "strategy=dpp: no such choice; .*did you mean ddp"),
        (("nproc=2", "strategy=ddp"), "nproc: is a key of verify itself; write it before --"),
        (("strategy=ddp", "optimizer.l=1"), "optimizer.l: no such key"),
        (("model=python_object",), "model=python_object"),
    ],
)
def test_wrong_keys_of_the_training_are_refused(keys: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        training_config(keys)


@pytest.mark.parametrize(
    ("keys", "ranks", "line"),
    [
        (("strategy=ddp",), 1, f"nproc: a run of one process is what others are compared with; .*as in: {EXAMPLE}$"),
        (("strategy=single",), 2, f"strategy=single: is what others are compared with; .*as in: {EXAMPLE}$"),
        (("strategy=ddp", "run_dir=x"), 2, f"run_dir=x: is chosen by this command .*as in: {EXAMPLE}$"),
        (("strategy=ddp", "resume=never"), 2, f"resume=never: is chosen by this command .*as in: {EXAMPLE}$"),
        (("strategy=ddp", "data.batch_size=1"), 2, "data.batch_size=1: the global batch is smaller"),
    ],
)
def test_what_cannot_be_verified_is_refused_before_ranks_meet(keys: tuple[str, ...], ranks: int, line: str) -> None:
    world = World(rank=0, size=ranks, local_rank=0, local_size=ranks, host="here")
    with pytest.raises(ConfigError, match=line):
        engine.check(training_config([*SMALL, *keys]), world)


def test_ranks_that_come_and_go_are_refused() -> None:
    for launch in (LaunchSettings(nproc=3, max_restarts=1), LaunchSettings(nnodes="1:2", rdzv_endpoint="a:1")):
        with pytest.raises(ConfigError, match=r"compares ranks that stay; .*as in: .* -- strategy=ddp$"):
            check(["strategy=ddp"], launch)


@pytest.mark.parametrize(
    ("keys", "nproc", "command"),
    [
        (["strategy=pipeline", "strategy.stages=2"], 1, "nproc=2 steps=4 -- strategy=pipeline strategy.stages=2"),
        (["model=resnet18"], 4, "nproc=4 steps=4 -- strategy=ddp model=resnet18"),
        (["model=resnet18", "strategy=single"], 2, "nproc=2 steps=4 -- strategy=ddp model=resnet18"),
        (["strategy=ddp", "run_dir=x", "seed=1"], 3, "nproc=3 steps=4 -- strategy=ddp seed=1"),
        (["strategy=ddp", "nproc=3", "seed=1"], 1, "nproc=3 steps=4 -- strategy=ddp seed=1"),
    ],
)
def test_a_refusal_ends_with_the_users_own_command_mended(
    keys: list[str], nproc: int, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/verify.py", "steps=4"])
    with pytest.raises(ConfigError) as refused:
        check(keys, LaunchSettings(nproc=nproc))
    assert str(refused.value).endswith(f"as in: python /somewhere/verify.py {command}")


def certificate(verdict: str) -> Certificate:
    choices = {"strategy": "ddp", "compression": "none", "model": "simple_cnn", "data": "digits"}
    return Certificate(verdict, [], {}, [], None, 2, choices, 2, {}, {}, {}, {})


def test_what_ends_with_exit_code_1_says_so_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    print_certificate(certificate(DIFFERENT), Path("there/certificate.json"))
    printed = capsys.readouterr()
    assert printed.out.startswith("NOT EQUAL: ")
    assert printed.err == (
        "distrain: the training is not that of one process; there/certificate.json says where it parts\n"
    )
    print_certificate(certificate(EQUAL), Path("certificate.json"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verdict", [EQUAL, DIFFERENT])
def test_a_certificate_that_cannot_be_printed_is_a_failure_that_says_why(
    verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(Failed):
            print_certificate(certificate(verdict), Path("certificate.json"))
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    line = capsys.readouterr().err
    assert line.startswith(f"distrain: {verdict.upper()}, says certificate.json; it can't be printed (")
    assert "No space left" in line
    assert line.count("\n") == 1
