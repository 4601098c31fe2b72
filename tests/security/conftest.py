"""Fixtures of the tests of security."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data.helpers import write_image
from tests.security.helpers import (
    Bomb,
    as_array,
    as_compressed_pickle,
    as_pickle,
    as_torch_file,
)
from tests.trained import original, run

__all__ = ["original", "run"]


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The file that a planted pickle creates when it runs; must not exist after the test."""
    mark = tmp_path / "it_ran"
    yield mark
    assert not mark.exists(), "the planted pickle ran"


@pytest.fixture(params=[as_pickle, as_torch_file, as_array, as_compressed_pickle])
def planted(request: pytest.FixtureRequest, mark: Path) -> bytes:
    content: bytes = request.param(Bomb(mark))
    return content


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Folder ``photos`` with two classes of two images each."""
    for kind in ("a", "b"):
        for number in range(2):
            write_image(tmp_path / "photos" / kind / f"{number}.png", np.full((4, 4, 3), number, dtype=np.uint8))
    return tmp_path / "photos"
