"""A small finished run that tests of the commands read, trained once a session, and ways to change a copy of it."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from distrain.cli import app
from distrain.config.load import to_container
from distrain.config.schema import Config
from distrain.data.base import data_source
from tests.data.helpers import images_of
from tests.harness import run_ranks
from tests.runs import LAUNCH, compose, small


def train(config: Config) -> dict[str, Any]:
    return app.train(config)


def save_test_images(config: Config, folder: Path) -> list[int]:
    """Writes the test images as PNG files named by their place; returns their labels."""
    test = data_source(config.data).load().test
    folder.mkdir()
    for place in range(len(test)):
        Image.fromarray(np.ascontiguousarray(images_of(test)[place].permute(1, 2, 0).numpy())).save(
            folder / f"{place:04d}.png"
        )
    labels: list[int] = test.targets.tolist()
    return labels


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 test images of 3x8x8 and 4 classes; after 2 epochs the model knows most of them, and not all."""
    folder = tmp_path_factory.mktemp("original") / "run"
    options = ("trainer.epochs=2", "data.noise=0.6", "optimizer.lr=0.003", f"run_dir={folder}")
    run_ranks(train, 1, small(*options))
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    copy: Path = shutil.copytree(original, tmp_path / "run")
    return copy


def change_config(run: Path, **sections: dict[str, Any]) -> None:
    """Changes keys of sections of ``config.yaml``."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    for section, changes in sections.items():
        content[section].update(changes)
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def replace_section(run: Path, section: str, *overrides: str) -> None:
    """Puts a section of another command line into ``config.yaml``."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    content[section] = to_container(compose(*overrides))[section]
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def launch(script: str, *arguments: str) -> None:
    """Runs a file of ``launch/`` in this process, as ``python`` would."""
    before, sys.argv = sys.argv, [f"launch/{script}.py", *arguments]
    try:
        runpy.run_path(str(LAUNCH / f"{script}.py"), run_name="__main__")
    finally:
        sys.argv = before


Refusal = Callable[..., str]


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refusal:
    """Types a command that must be refused; returns the one line it says."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(script: str, *arguments: str) -> str:
        # The command sets it for itself, and stays in this process.
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as ended:
            launch(script, *arguments)
        said = capfd.readouterr()
        assert ended.value.code == 2
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        assert said.err.startswith("distrain: ")
        return said.err.removeprefix("distrain: ").rstrip()

    return call
