"""Which words start a command, and which ones a user types."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrain.runtime import program


def test_commands_are_started_by_the_file_of_this_package() -> None:
    assert program.starting("train") == [str(program.MAIN), "train"]
    assert program.MAIN.exists()


@pytest.mark.parametrize("installed", [True, False])
def test_words_are_shown_as_they_are_typed(installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_is_installed", lambda: installed)
    here = tmp_path / "bin"
    here.mkdir()
    for name in ("distrain", "torchrun"):
        here.joinpath(name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(here))
    main = ["-m", "distrain"] if installed else [str(program.MAIN)]
    for words, expected in {
        ("/p/python", f"{here}/distrain"): ["distrain"],
        ("/p/python", "/other/distrain"): ["/other/distrain"],
        (f"{here}/distrain",): ["distrain"],
        ("/p/python", f"{here}/torchrun", "--nproc-per-node", "2", str(program.MAIN)): [
            *("torchrun", "--nproc-per-node", "2"),
            *main,
        ],
        ("python", "-u", "-m", "distrain"): ["python", "-u", "-m", "distrain"],
        ("python", "launch/train.py"): ["python", "launch/train.py"],
    }.items():
        assert program.short(words) == expected


def test_scripts_lie_beside_the_one_that_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/checkout/launch/train.py"])
    assert program.script("doctor") == "/checkout/launch/doctor.py"
