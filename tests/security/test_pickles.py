"""A pickle in the place of any file is refused with the file's name, and a whole training unpickles nothing."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from distrain.checkpoint import format as checkpoint_format
from distrain.cli import hydra_entry
from distrain.cli.run_folder import RunFolder
from distrain.data import cifar10, decode, image_cache
from distrain.data.decode import DecodeError
from distrain.data.digits import Digits
from tests.data.helpers import source
from tests.harness import HANG_SECONDS, run_ranks
from tests.runs import CONF, small, train_on_rank
from tests.security.helpers import (
    Bomb,
    as_pickle,
    load_tree,
    one_line_error,
)


def test_planted_pickle_runs_when_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(as_pickle(Bomb(tmp_path / "it_ran")))
    assert (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("name", ["config.yaml", "data.json"])
def test_pickle_in_a_run_folder_is_refused_by_name(run: Path, planted: bytes, name: str) -> None:
    (run / name).write_bytes(planted)
    assert f"run={run}: {name} " in one_line_error(lambda: RunFolder.open(str(run)))


def test_pickle_in_place_of_any_file_of_a_checkpoint_is_refused_by_name(run: Path, planted: bytes) -> None:
    path = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) >= 4
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(planted)
        assert str(file) in one_line_error(lambda: RunFolder.open(str(run)).weights(str(path)))
        file.write_bytes(whole)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's files with ten images each."""
    monkeypatch.setattr(cifar10, "BATCH_IMAGES", 10)
    folder = tmp_path / "data" / cifar10.FOLDER
    folder.mkdir(parents=True)
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / f"{name}.bin").write_bytes(b"".join(bytes([label]) + bytes(3072) for label in range(10)))
    (folder / "batches.meta.txt").write_text("\n".join(cifar10.CLASSES))
    return folder


@pytest.mark.parametrize("padded", [False, True], ids=["as it is", "of the right size"])
def test_pickle_in_place_of_a_file_of_cifar10_is_refused_by_name(cifar: Path, planted: bytes, padded: bool) -> None:
    for file in sorted(cifar.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(planted.ljust(len(whole), b"\xff") if padded else planted)
        if len(file.read_bytes()) > len(whole) and padded:
            file.write_bytes(planted[: len(whole)])
        assert file.name in one_line_error(lambda: source("cifar10", root=str(cifar)).load())
        file.write_bytes(whole)
    source("cifar10", root=str(cifar)).load()


def test_python_edition_of_cifar10_is_refused(tmp_path: Path, planted: bytes) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / name).write_bytes(planted)
    for root in (tmp_path, folder):
        message = one_line_error(lambda root=root: source("cifar10", root=str(root)).load())  # type: ignore[misc]
        assert message.startswith(f"data.root={root}: lacks cifar-10-batches-bin")


def test_pickle_in_place_of_the_digits_is_refused_by_name(
    tmp_path: Path, planted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "digits.csv.gz"
    file.write_bytes(planted)
    monkeypatch.setattr(Digits, "_path", lambda self: file)
    assert f"data: {file} can't be read" in one_line_error(lambda: source("digits").load())


def test_pickle_in_place_of_an_image_is_refused_by_name(tmp_path: Path, planted: bytes) -> None:
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).write_bytes(planted)
        message = one_line_error(lambda name=name: decode.decode(tmp_path / name, 4, 4, 3), DecodeError)  # type: ignore[misc]
        assert message.startswith(f"{tmp_path / name}: cannot identify")


def test_invalid_cache_is_not_used(tree: Path, planted: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    open_cache, asked = image_cache._open, []

    def watched(*arguments: Any) -> Any:
        asked.append(arguments)
        return open_cache(*arguments)

    monkeypatch.setattr(image_cache, "_open", watched)
    load_tree(tree)
    recipe, cache = asked[-1]
    assert open_cache(recipe, cache) is not None
    nonsense = ["[]", "3", '{"broken": 3}', '{"broken": {"x": 1}}', '{"broken": {"99": ""}}', '{"broken":' * 50_000]
    for name in ("meta.json", "images.u8", "moments.i64"):
        whole = (cache / name).read_bytes()
        for content in [planted, *(text.encode() for text in nonsense)]:
            (cache / name).write_bytes(content)
            assert open_cache(recipe, cache) is None
        (cache / name).write_bytes(whole)
    assert open_cache(recipe, cache) is not None


def test_hydra_rerun_from_a_pickle_is_refused(
    tmp_path: Path, planted: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.pickle").write_bytes(planted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", f"--experimental-rerun={tmp_path}/config.pickle"])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as ended:
            hydra_entry.main(lambda composed: None, CONF, "config")
    assert ended.value.code == 2
    assert "reads a pickle, which could run any code" in capfd.readouterr().err


# --- a whole training reads none -------------------------------------------------------------------------------------

_RUNS = (
    ("strategy=ddp", "compression=powersgd", "logger=tensorboard", "trainer.max_steps=2", "run_dir=ddp"),
    ("strategy=ddp", "compression=powersgd", "logger=tensorboard", "trainer.max_steps=3", "run_dir=ddp"),
    ("strategy=pipeline", "data.batch_size=12", "trainer.max_steps=2", "run_dir=pipeline"),
    ("strategy=local_sgd", "strategy.sync_every=2", "trainer.max_steps=2", "run_dir=local_sgd"),
    ("strategy=parameter_server", "trainer.max_steps=2", "run_dir=parameter_server"),
)


def train_and_watch(folder: str) -> list[str]:
    """Trains and saves under every strategy, resumes one, and returns all names that an unpickler looked up."""
    seen: list[str] = []
    sys.addaudithook(
        lambda event, args: seen.append(".".join(map(str, args))) if event == "pickle.find_class" else None
    )
    os.chdir(folder)
    for options in _RUNS:
        train_on_rank(small(*options))
    pickle.loads(pickle.dumps(Path("watched")))
    return seen


def test_training_saving_and_resuming_unpickle_nothing(tmp_path: Path) -> None:
    for seen in run_ranks(train_and_watch, 2, str(tmp_path), timeout=HANG_SECONDS):
        assert seen == [f"{type(tmp_path).__module__}.{type(tmp_path).__name__}"]
