"""Which releases of torch are allowed, and when one is named as untested."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from distrain.runtime.torch_version import NEWEST_TESTED, OLDEST_TESTED, warn_if_untested

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
#: Packages with an upper bound, and why: hydra-core 1.4 is not out, and hydra-core 1.3 allows no newer omegaconf.
BOUNDED = {"hydra-core", "omegaconf"}


@pytest.mark.parametrize(
    ("version", "line"),
    [
        ("2.16.0", f"torch 2.16.0 is newer than {NEWEST_TESTED}, the newest that distrain was tested with"),
        ("2.100.0", f"torch 2.100.0 is newer than {NEWEST_TESTED}, the newest that distrain was tested with"),
        (
            "3.0.0a0+git",
            f"torch 3.0.0a0+git is newer than {NEWEST_TESTED}, the newest that distrain was tested with",
        ),
        ("2.5.1", f"torch 2.5.1 is older than {OLDEST_TESTED}, the oldest that distrain was tested with"),
        *((version, None) for version in (OLDEST_TESTED, "2.13.0+cpu", f"{NEWEST_TESTED}+cu132", "2.15.7", "unknown")),
    ],
)
def test_an_untested_torch_is_named_in_one_line(
    version: str, line: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_untested(version)
    assert caplog.messages == ([] if line is None else [line])


def requirements() -> dict[str, str]:
    """What an installed distrain requires, by package; tomllib is not in Python 3.10."""
    block = PYPROJECT.read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    lines = re.findall(r'^    "([A-Za-z0-9_-]+)([^"]*)",$', block, re.MULTILINE)
    return dict(lines)


def test_no_installed_release_is_too_new() -> None:
    needed = requirements()
    assert needed["torch"] == f">={OLDEST_TESTED.removesuffix('.0')}"
    assert {name for name, versions in needed.items() if re.search("<|==|~=", versions)} == BOUNDED
