"""CheckpointTracker are damaged as asked, and the damaged ones are remembered."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from distrain.checkpoint import writer as checkpoint_writer
from distrain.tools.chaos.damage import CheckpointTracker
from distrain.tools.chaos.plan import Fault
from tests.checkpoint.helpers import progress, state

CONTENTS = {"manifest.json": b"{}", "model.safetensors": bytes(range(200)), "state.json": b"{1}"}


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointTracker:
    for step in (10, 20):
        make(tmp_path / f"step_{step:08d}")
    return CheckpointTracker(tmp_path)


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
def test_one_file_of_the_newest_checkpoint_is_damaged(kind: str, draw: float, checkpoints: CheckpointTracker) -> None:
    description = checkpoints.damage(fault(kind, draw, draw, draw))
    (name,) = changed(checkpoints.folder / "step_00000020")
    assert description.startswith(f"step_00000020/{name} ")
    assert changed(checkpoints.folder / "step_00000010") == []


def test_truncated_file_is_a_prefix_of_the_original(checkpoints: CheckpointTracker) -> None:
    description = checkpoints.damage(fault("truncate", 0.5, 0.25, 0.0))
    assert description == "step_00000020/model.safetensors truncated from 200 to 50 bytes"
    assert (checkpoints.folder / "step_00000020/model.safetensors").read_bytes() == bytes(range(50))


def test_exactly_one_bit_is_flipped(checkpoints: CheckpointTracker) -> None:
    description = checkpoints.damage(fault("flip_bit", 0.5, 0.25, 0.4))
    assert description == "step_00000020/model.safetensors bit 3 of byte 50 flipped"
    content = (checkpoints.folder / "step_00000020/model.safetensors").read_bytes()
    assert [a ^ b for a, b in zip(content, range(200), strict=True)] == [8 * (place == 50) for place in range(200)]


def test_next_damage_hits_the_newest_intact_checkpoint(checkpoints: CheckpointTracker) -> None:
    for step in (20, 10):
        newest = checkpoints.newest_intact()
        assert newest is not None
        assert newest.name == f"step_{step:08d}"
        assert checkpoints.damage(fault("truncate", 0.0, 0.0, 0.0)).startswith(newest.name)
    assert checkpoints.newest_intact() is None
    assert [path.name for path in checkpoints.damaged()] == ["step_00000010", "step_00000020"]


def test_checkpoint_saved_again_counts_as_intact(checkpoints: CheckpointTracker) -> None:
    checkpoints.damage(fault("delete_file", 0.0, 0.0, 0.0))
    shutil.rmtree(checkpoints.folder / "step_00000020")
    assert checkpoints.damaged() == []
    # File times advance a few hundred times a second; a real save takes longer than one tick.
    time.sleep(0.02)
    make(checkpoints.folder / "step_00000020")
    assert checkpoints.damaged() == []
    newest = checkpoints.newest_intact()
    assert newest is not None
    assert newest.name == "step_00000020"


def test_hidden_folder_is_a_save_in_progress_unless_it_is_being_deleted(checkpoints: CheckpointTracker) -> None:
    assert not checkpoints.save_in_progress()
    checkpoints.folder.joinpath(".step_00000030.host.7.replaced").mkdir()
    assert not checkpoints.save_in_progress()
    checkpoints.folder.joinpath(".step_00000030.host.7").mkdir()
    assert checkpoints.save_in_progress()


def test_complete_save_is_published_and_incomplete_save_stays_hidden(checkpoints: CheckpointTracker) -> None:
    saved = checkpoint_writer.save(checkpoints.folder, state(), progress(30))
    saved.rename(checkpoints.folder / ".step_00000030.host.1")
    make(checkpoints.folder / ".step_00000040.host.1")
    checkpoints.publish_complete()
    assert checkpoints.newest_intact() == saved
    assert (checkpoints.folder / ".step_00000040.host.1").is_dir()
