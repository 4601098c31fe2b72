"""Help shows commands as its reader starts them."""

from __future__ import annotations

import pytest

from distrain.cli import typed_help
from distrain.runtime import program

HELP = """\
  distrain train                                         one process
  torchrun --nproc-per-node 2 -m distrain train a=b      two processes
  distrain hosts hosts=[a] -- strategy=ddp     too long for its column
  distrain and its data are at the same paths
  eval "$(distrain --completion bash)"
"""
BY_SCRIPT = """\
  python launch/train.py                                 one process
  torchrun --nproc-per-node 2 launch/train.py a=b        two processes
  python launch/hosts.py hosts=[a] -- strategy=ddp  too long for its column
  distrain and its data are at the same paths
  eval "$(python launch/train.py -sc install=bash)"
"""


@pytest.mark.parametrize(("name", "shown"), [("evaluate", HELP), (None, BY_SCRIPT)])
def test_commands_are_shown_as_this_one_was_started(
    name: str | None, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "_name", name)
    monkeypatch.setattr("sys.argv", ["launch/evaluate.py"])
    assert typed_help.as_started(HELP) == shown
    with typed_help.printed_as_started():
        print(HELP, end="")
    assert capsys.readouterr().out == shown
