"""The launcher's template: placeholders are filled in, and invalid templates are refused."""

from __future__ import annotations

import sys

import pytest

from distrain.errors import ConfigError
from distrain.runtime import program
from distrain.tools.chaos.launchers import CommandLauncher


def test_template_is_filled_in_word_by_word() -> None:
    launcher = CommandLauncher("{python} -n {nproc} {train} {keys}", 3)
    assert launcher.command(["a=1", "b=[1, 2]"]) == [
        sys.executable,
        "-n",
        "3",
        *program.starting("train"),
        "a=1",
        "b=[1, 2]",
    ]


def test_keys_inside_a_word_are_quoted_for_a_shell() -> None:
    launcher = CommandLauncher("sh -c 'train {keys}; true'", 1)
    assert launcher.command(["b=[1, 2]"]) == ["sh", "-c", "train 'b=[1, 2]'; true"]


@pytest.mark.parametrize("template", ["train {keys} {hosts}", "train {keys} 'open", "train {keys} {"])
def test_template_that_cannot_be_filled_in_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"^launcher=.*can't be filled in .*allowed placeholders: \{python\}"):
        CommandLauncher(template, 1)


def test_template_without_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs \{keys\}"):
        CommandLauncher("train", 1)
