"""What the Tab key offers at the end of a line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from distrain.cli import completion
from distrain.cli.dispatch import COMMANDS


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with choices of a user and some files; the environment is restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["distrain"])
    monkeypatch.setenv("COMP_LINE", "")
    tmp_path.joinpath("mine", "model").mkdir(parents=True)
    tmp_path.joinpath("mine", "model", "net.yaml").write_text("name: custom\n_target_: net.Net\n")
    tmp_path.joinpath("file").touch()
    tmp_path.joinpath(".hidden").touch()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("distrain ", [*COMMANDS, "--help", "--version", "--completion"]),
        ("distrain tr", ["train"]),
        ("distrain --completion ", ["bash", "zsh", "fish"]),
        ("distrain nothing ", ["file", "mine/"]),
        ("distrain train --c", ["--config-dir", "--cfg"]),
        ("distrain train --config-dir m", ["mine/"]),
        ("distrain train strategy=d", ["strategy=ddp"]),
        ("distrain train data=p", []),
        ("distrain train --config-dir mine model=n", ["model=net"]),
        ("distrain train optimizer=sgd optimizer.mo", ["optimizer.momentum="]),
        ("distrain train optimizer.betas=", ["optimizer.betas=file", "optimizer.betas=mine/"]),
        ("distrain train data.root=./", ["data.root=./file", "data.root=./mine/"]),
        ("distrain train data.root=./.", ["data.root=./.hidden"]),
        ("distrain evaluate ru", ["run="]),
        ("distrain compare m", ["mine/", "metric="]),
        ("distrain compare mine/model ou", ["output="]),
        ("distrain watch m", ["mine/"]),
        ("distrain watch mine/model on", ["once="]),
        ("distrain evaluate run=m", ["run=mine/"]),
        ("distrain evaluate run=mine/", ["run=mine/model/"]),
        ("distrain evaluate mo", []),
        ("distrain train np", ["nproc="]),
        ("distrain predict np", ["nproc="]),
        ("distrain export np", []),
        ("distrain sweep sweep.m", ["sweep.minutes=", "sweep.metric="]),
        ("distrain sweep strategy=d", ["strategy=ddp"]),
        ("distrain hosts hosts=[a] -- strategy=d", ["strategy=ddp"]),
        ("distrain testnet -- ", []),
        ("distrain testnet ra", ["rate="]),
    ],
)
def test_tab_offers_commands_keys_choices_and_files(
    line: str, offered: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    completion.print_candidates(line, list(COMMANDS))
    assert capsys.readouterr().out.splitlines() == offered


@pytest.mark.parametrize("shell", completion.SCRIPTS)
def test_scripts_are_in_their_shells_language(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    checked = subprocess.run([shell, "-n"], input=completion.script(shell), text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_bash_replaces_only_what_follows_the_equals_sign(tmp_path: Path) -> None:
    """Bash takes ``=`` for the end of a word, unless the user has changed that."""
    tmp_path.joinpath("distrain").write_text("#!/bin/sh\necho strategy=ddp; echo strategy=local_sgd; echo strategy.\n")
    tmp_path.joinpath("distrain").chmod(0o755)
    ask = (
        "\nCOMP_LINE='distrain train strategy='; COMP_POINT=${#COMP_LINE}\n"
        "_distrain_complete; printf '<%s>' \"${COMPREPLY[@]}\"\n"
        "COMP_WORDBREAKS=' '; _distrain_complete; printf '<%s>' \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", completion.script("bash") + ask],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.stdout == "<ddp ><local_sgd ><strategy.><strategy=ddp ><strategy=local_sgd ><strategy.>", done.stderr
