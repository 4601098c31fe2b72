"""Paths are read back from Hydra's command line as they were."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from distrain.config.quoting import path_setting

PATHS = [
    "outputs/2026-11-29/01-02-03",
    "/tmp/a b/run",
    "a=b/c",
    "a,b",
    "[a]/b",
    "2026_11_29",
    "1e5",
    "it's/here",
    'say "hi"/run',
    "back\\slash/",
    "(x)/~y",
    "ünï/cödé",
    "True",
    "null",
    "runs/1",
    "$HOME/run",
    "a:b/c",
    "x/",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_survives_the_shell_and_hydra(path: str) -> None:
    (argument,) = shlex.split(shlex.join([path_setting("run_dir", path)]))
    assert str(OverridesParser.create().parse_override(argument).value()) == path


def test_an_ordinary_path_needs_no_quotes() -> None:
    assert path_setting("run_dir", "outputs/2026-11-29/a") == "run_dir=outputs/2026-11-29/a"
