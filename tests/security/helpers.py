"""Harmful file contents and what refuses them, for the tests of security."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrain.errors import ConfigError
from tests.data.helpers import source


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def as_pickle(bomb: Bomb) -> bytes:
    return pickle.dumps(bomb)


def as_torch_file(bomb: Bomb) -> bytes:
    file = io.BytesIO()
    torch.save({"model": bomb}, file)
    return file.getvalue()


def as_array(bomb: Bomb) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([bomb], dtype=object), allow_pickle=True)
    return file.getvalue()


def as_compressed_pickle(bomb: Bomb) -> bytes:
    return gzip.compress(pickle.dumps(bomb))


def one_line_error(call: Callable[[], object], kind: type[Exception] = ConfigError) -> str:
    """Calls a function that must raise an error of one line, and returns its message."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load_tree(tree: Path) -> Any:
    return source("image_folder", root=str(tree), height=4, width=4, workers=1).load()
