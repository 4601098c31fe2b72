"""Damage to checkpoints: what is done, and what is remembered of it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from distrain.checkpoint import writer as checkpoint_writer
from distrain.tools.chaos.damage import Checkpoints
from distrain.tools.chaos.plan import Fault

CONTENTS = {"manifest.json": b"{}", "model.safetensors": bytes(range(200)), "state.json": b"{1}"}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    for step in (10, 20):
        make(tmp_path / f"step_{step:08d}")
    return Checkpoints(tmp_path)


def make(folder: Path) -> None:
    folder.mkdir()
    for name, content in CONTENTS.items():
        folder.joinpath(name).write_bytes(content)


def fault(kind: str, *draws: float) -> Fault:
    which, place, bit = draws
    return Fault(kind, 1, 0.0, 0, (which, place, bit))


def changed(folder: Path) -> list[str]:
    return [name for name in CONTENTS if not same(folder / name, CONTENTS[name])]


def same(file: Path, content: bytes) -> bool:
    return file.is_file() and file.read_bytes() == content


@pytest.mark.parametrize("kind", ["truncate", "flip_bit", "delete_file"])
@pytest.mark.parametrize("draw", [0.0, 0.4, 0.999])
def test_one_file_of_the_newest_checkpoint_is_damaged(kind: str, draw: float, checkpoints: Checkpoints) -> None:
    told = checkpoints.damage(fault(kind, draw, draw, draw))
    (name,) = changed(checkpoints.folder / "step_00000020")
    assert told.startswith(f"step_00000020/{name} ")
    assert changed(checkpoints.folder / "step_00000010") == []


def test_a_cut_file_is_the_beginning_of_what_it_was(checkpoints: Checkpoints) -> None:
    told = checkpoints.damage(fault("truncate", 0.5, 0.25, 0.0))
    assert told == "step_00000020/model.safetensors cut from 200 to 50 bytes"
    assert (checkpoints.folder / "step_00000020/model.safetensors").read_bytes() == bytes(range(50))


def test_a_turned_bit_is_one_bit(checkpoints: Checkpoints) -> None:
    told = checkpoints.damage(fault("flip_bit", 0.5, 0.25, 0.4))
    assert told == "step_00000020/model.safetensors bit 3 of byte 50 turned"
    content = (checkpoints.folder / "step_00000020/model.safetensors").read_bytes()
    assert [a ^ b for a, b in zip(content, range(200), strict=True)] == [8 * (place == 50) for place in range(200)]


def test_the_next_damage_is_done_to_the_newest_that_is_whole(checkpoints: Checkpoints) -> None:
    for step in (20, 10):
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.name == f"step_{step:08d}"
        assert checkpoints.damage(fault("truncate", 0.0, 0.0, 0.0)).startswith(newest.name)
    assert checkpoints.newest() is None
    assert [path.name for path in checkpoints.damaged()] == ["step_00000010", "step_00000020"]


def test_a_checkpoint_saved_again_is_whole(checkpoints: Checkpoints) -> None:
    checkpoints.damage(fault("delete_file", 0.0, 0.0, 0.0))
    shutil.rmtree(checkpoints.folder / "step_00000020")
    assert checkpoints.damaged() == []
    # A file system's clock ticks a few hundred times a second, and a save takes longer than that.
    time.sleep(0.02)
    make(checkpoints.folder / "step_00000020")
    assert checkpoints.damaged() == []
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.name == "step_00000020"


def test_a_hidden_folder_is_a_save_in_progress_unless_it_is_on_its_way_out(checkpoints: Checkpoints) -> None:
    assert not checkpoints.being_written()
    checkpoints.folder.joinpath(".step_00000030.host.7.replaced").mkdir()
    assert not checkpoints.being_written()
    checkpoints.folder.joinpath(".step_00000030.host.7").mkdir()
    assert checkpoints.being_written()


def test_a_save_that_is_complete_gets_its_name_and_one_that_is_not_stays_hidden(checkpoints: Checkpoints) -> None:
    held = {"model": {}, "optimizer": {}, "scalars": {}, "layout": {"world_size": 1}}
    saved = checkpoint_writer.save(checkpoints.folder, held, {"step": 30})
    saved.rename(checkpoints.folder / ".step_00000030.host.1")
    make(checkpoints.folder / ".step_00000040.host.1")
    checkpoints.name_complete()
    assert checkpoints.newest() == saved
    assert (checkpoints.folder / ".step_00000040.host.1").is_dir()
