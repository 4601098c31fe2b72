"""The command: which arguments are folders, what it prints and writes, and what it refuses."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import pytest

from distrain.cli.commands import compare
from tests.tools.comparison.runs import SUMMARY, write_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's folder, which is the current one."""
    write_run(tmp_path / "000_compression=none,optimizer.lr=0.1")
    write_run(tmp_path / "001_compression=none,optimizer.lr=0.2", summary={**SUMMARY, "test_accuracy": 0.99})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        compare.main(arguments)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_sweeps_folder_becomes_a_table_and_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.main([".", "metric=test_accuracy"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run")
    assert lines[1].startswith("001_compression=none,optimizer.lr=0.2")
    assert lines[2].startswith("000_compression=none,optimizer.lr=0.1")
    assert lines[3].startswith("compare.html: 2 runs, ")
    assert "the difference to 001_compression=none,optimizer.lr=0.2" in (folder / "compare.html").read_text()


def test_a_folder_whose_name_looks_like_settings_is_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.main(["000_compression=none,optimizer.lr=0.1", "output=null"])
    assert capsys.readouterr().out.splitlines()[1].startswith("000_compression=none,optimizer.lr=0.1")
    assert not (folder / "compare.html").exists()


@pytest.mark.usefixtures("folder")
def test_the_page_can_be_written_to_standard_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    compare.main([".", "output=-", "'baseline=\"000_compression=none,optimizer.lr=0.1\"'".strip("'")])
    printed = capsys.readouterr().out
    assert printed.startswith("<!DOCTYPE html>")
    assert printed.endswith("</html>\n")


@pytest.mark.usefixtures("folder")
def test_the_page_is_opened_if_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    opened: list[str] = []

    def show(url: str) -> bool:
        opened.append(url)
        return False

    monkeypatch.setattr(webbrowser, "open", show)
    compare.main([".", "open=true"])
    assert opened[0].startswith("file:///")
    assert opened[0].endswith("/compare.html")
    assert "no browser was found" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name at least one folder"),
        (["nowhere"], "DIR=nowhere: there is no such folder"),
        (["nowhere=1"], "nowhere: no such key"),
        ([".", "out=x.html"], "did you mean output?"),
        ([".", "metric=test_acuracy"], "did you mean test_accuracy?"),
        ([".", "baseline=zero"], "baseline=zero: is none of the runs; choices: 000_"),
        ([".", "output=none/x.html"], "there is no folder none"),
        ([".", "output=."], "is not a plain file"),
        ([".", "open=maybe"], "open=maybe"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, *arguments)


@pytest.mark.usefixtures("folder")
def test_hydras_options_keep_their_values(capsys: pytest.CaptureFixture[str]) -> None:
    compare.main([".", "--cfg", "job", "metric=x"])
    assert "metric: x" in capsys.readouterr().out.splitlines()


def test_help_explains_the_command_and_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    compare.main(["--help", "metric"])
    assert "the best first" in capsys.readouterr().out
