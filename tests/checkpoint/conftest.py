"""A saved checkpoint, and the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from distrain.checkpoint import writer as checkpoint_writer
from tests.checkpoint.helpers import progress, state


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of step 40."""
    return checkpoint_writer.save(tmp_path, state(), progress(40))


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Messages in the log."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Lines(), logging.getLogger("distrain")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
