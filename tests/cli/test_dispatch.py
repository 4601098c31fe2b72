"""``distrain COMMAND``: help, version, and how commands are found and started."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import distrain
from distrain.cli import commands, dispatch
from distrain.cli.commands import train
from distrain.runtime import launcher, program
from tests.harness import HANG_SECONDS
from tests.runs import LAUNCH

Typed = Callable[..., int]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Runs ``distrain …`` in this process; returns the exit code."""
    monkeypatch.setattr(program, "_name", None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def call(*words: str, program: str = "/venv/bin/distrain") -> int:
        monkeypatch.setattr(sys, "argv", [program, *words])
        try:
            dispatch.run(sys.argv)
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 0
        return 0

    return call


def test_help_has_one_line_for_each_command(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("--help") == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^  (\w+)  +\w.*", printed, re.MULTILINE) == list(dispatch.COMMANDS)
    assert typed("-h") == 0
    assert capsys.readouterr().out == printed
    assert typed() == 2
    assert capsys.readouterr().out == printed
    assert max(map(len, printed.splitlines())) <= 120


def test_each_command_has_a_module_and_a_script() -> None:
    modules = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    assert modules == dispatch.COMMANDS.keys()
    assert {path.stem for path in LAUNCH.glob("*.py")} <= modules


def test_version_is_that_of_the_package(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("--version") == 0
    assert capsys.readouterr().out == f"distrain {distrain.__version__}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("trian",), "trian: no such command; choices: train, .* \\(did you mean train\\?\\)"),
        (
            ("strategy=ddp",),
            "strategy=ddp: no such command; settings follow a command, as in: distrain train .*",
        ),
        (("--verison",), "--verison: no such command"),
        (("--completion",), "--completion=: there is none for this shell; choices: bash, zsh, fish"),
        (("--completion", "bsh"), "--completion=bsh: there is none for this shell; .* \\(did you mean bash\\?\\)"),
        (("train", "-sc", "install=tcsh"), "--completion=tcsh: there is none for this shell"),
        (("train", "strategy=dpd"), "strategy=dpd: no such choice; .* \\(did you mean ddp\\?\\)"),
        (("evaluate", "rn=x"), "rn: no such key; .* \\(did you mean run\\?\\)"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    words: tuple[str, ...], line: str, typed: Typed, capfd: pytest.CaptureFixture[str]
) -> None:
    assert typed(*words) == 2
    said = capfd.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert re.match(f"distrain: {line}", said.err), said.err


@pytest.mark.parametrize(
    ("started", "alone", "several"),
    [
        ("/elsewhere/distrain", "/elsewhere/distrain train a=b", "/elsewhere/distrain train nproc=2 a=b"),
        (str(program.MAIN), "python -m distrain train a=b", "python -m distrain train nproc=2 a=b"),
    ],
)
def test_a_command_knows_what_its_user_typed(
    started: str, alone: str, several: str, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(program, "_is_installed", lambda: True)
    monkeypatch.setattr(train, "main", lambda: said.extend(launcher.command(sys.argv, {}, ranks=n) for n in (1, 2)))
    typed("train", "a=b", program=started)
    assert said == [alone, several]


#: Runs ``python -m distrain --help`` and says what it imported.
IMPORTED = """
import runpy, sys

sys.argv = ["distrain", "--help"]
try:
    runpy.run_module("distrain", run_name="__main__", alter_sys=True)
finally:
    print("imported:", [name for name in ("torch", "hydra", "omegaconf", "numpy") if name in sys.modules])
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def test_help_imports_neither_torch_nor_hydra(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", IMPORTED)
    assert done.stdout.endswith("imported: []\n"), done.stderr


def test_a_reader_who_has_read_enough_is_no_error(tmp_path: Path) -> None:
    line = f"{sys.executable} {program.MAIN} train --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] in ("0", "141")


@pytest.mark.parametrize("start", [("-m", "distrain"), (str(program.MAIN),)])
def test_modules_of_the_current_folder_take_nobodys_place(start: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("hydra", "omegaconf", "yaml", "rng", "errors"):
        tmp_path.joinpath(f"{name}.py").write_text("raise SystemExit('planted')\n")
    tmp_path.joinpath("distrain").mkdir()
    done = run(tmp_path, *start, "train", "optimizer.lrr=1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("distrain: optimizer.lrr: no such key")
