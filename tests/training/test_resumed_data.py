"""A run whose data changed since its checkpoint was saved: said in one line, or refused if it can't go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from distrain.cli import app
from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.files.writing import to_json
from tests.checkpoint.helpers import rewrite
from tests.data.helpers import write_image
from tests.runs import compose

IMAGES = 20
#: 40 images: 4 for testing, 4 for validation, 32 in batches of 10. An epoch has 4 steps.
OPTIONS = (
    "data=image_folder",
    "data.height=8",
    "data.width=8",
    "data.workers=1",
    "data.batch_size=10",
    "logger=none",
    "trainer.progress=off",
    "trainer.epochs=9",
    "runtime.threads=1",
)


def add_class(root: Path, name: str, count: int = IMAGES) -> None:
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        write_image(root / name / f"{number}.png", noise)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images`` and a ``run`` on them that ended in the middle of its second epoch."""
    root = tmp_path_factory.mktemp("data")
    for name in ("cat", "dog"):
        add_class(root / "images", name)
    app.train(compose(*OPTIONS, f"data.root={root}/images", f"run_dir={root}/run", "trainer.max_steps=6"))
    return root


@pytest.fixture
def root(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


def config(root: Path, *overrides: str) -> Config:
    return compose(*OPTIONS, f"data.root={root}/images", f"run_dir={root}/run", "trainer.max_steps=8", *overrides)


def written_by_an_older_release(run: Path) -> None:
    """Removes what older releases did not write: the number of samples, and all of the data in checkpoints."""
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(to_json({key: value for key, value in data.items() if key != "samples"}))
    for path in (run / "checkpoints").glob("step_*"):
        content = json.loads((path / "state.json").read_text())
        rewrite(path, "state.json", to_json({key: value for key, value in content.items() if key != "data"}).encode())


def warnings_of(screen: str) -> list[str]:
    return [line for line in screen.splitlines() if line.startswith("THE DATA CHANGED")]


def test_nothing_is_said_of_data_that_are_as_before(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app.train(config(root))
    screen = capsys.readouterr().err
    assert "resumed from" in screen
    assert warnings_of(screen) == []


@pytest.mark.parametrize("older", [False, True])
def test_images_that_were_added_are_said(root: Path, capsys: pytest.CaptureFixture[str], older: bool) -> None:
    if older:
        written_by_an_older_release(root / "run")
    add_class(root / "images", "cat", IMAGES + 10)
    app.train(config(root))
    screen = capsys.readouterr().err
    (said,) = warnings_of(screen)
    assert said.startswith("THE DATA CHANGED since step_00000006 was saved: ")
    assert "mean: [" in said
    samples = "samples.train: 32 → 41, samples.test: 4 → 5"
    order = "epoch 2 goes on in another order: it has some samples twice, others never"
    assert (samples in said, order in said) == (not older, not older)
    row = "data position  changed        epoch 1, 20 of 32 samples seen; there are 41 now, in another order"
    assert (row in screen) == (not older)
    # What was saved since then is of the new data.
    app.train(config(root, "trainer.max_steps=9"))
    assert warnings_of(capsys.readouterr().err) == []


def test_renamed_classes_are_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "images" / "dog").rename(root / "images" / "wolf")
    app.train(config(root))
    (said,) = warnings_of(capsys.readouterr().err)
    assert "was saved: class 1: dog → wolf; the run goes on with the new data" in said


def test_what_the_data_were_is_known_wherever_the_checkpoint_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = root / "step_00000006"
    (root / "run" / "checkpoints" / elsewhere.name).rename(elsewhere)
    (root / "images" / "cat" / "0.png").unlink()
    app.train(config(root, f"resume={elsewhere}", f"run_dir={root}/other"))
    assert "samples.train: 32 → 31" in warnings_of(capsys.readouterr().err)[0]


def test_a_run_that_starts_anew_is_not_compared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "images" / "cat" / "0.png").unlink()
    app.train(config(root, "resume=never"))
    assert warnings_of(capsys.readouterr().err) == []


@pytest.mark.parametrize("older", [False, True])
def test_another_number_of_classes_is_refused_and_the_run_left_as_it_was(root: Path, older: bool) -> None:
    if older:
        written_by_an_older_release(root / "run")
    add_class(root / "images", "owl")
    before = {path: path.read_bytes() for path in (root / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as refused:
        app.train(config(root))
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"resume={root}/run/checkpoints/step_00000006: the saved model is not this model: ")
    assert "(the data changed: number of classes: 2 → 3)" in line
    assert {path: path.read_bytes() for path in (root / "run").rglob("*") if path.is_file()} == before


def test_a_data_file_that_no_run_writes_is_not_compared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written_by_an_older_release(root / "run")
    for content in ('{"classes": 3}', '{"mean": [1e999]}', '{"samples": {"train": {}}}', "[]", "not JSON", "\x00"):
        (root / "run" / "data.json").write_text(content)
        app.train(config(root))
    assert warnings_of(capsys.readouterr().err) == []
