"""Invalid events, and nothing else, are removed from TensorBoard's event files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from distrain.reporting import event_files


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("behind_events", [False, True])
def test_pickled_data_is_removed_without_being_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, behind_events: bool
) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 1)
    (file,) = event_files.event_paths(tmp_path)
    whole = file.read_bytes()
    file.write_bytes((whole if behind_events else b"") + pickle.dumps(Bomb(tmp_path / "it_ran")))
    event_files.remove_events(tmp_path, lambda step, value: True)
    assert f"removed everything after byte {len(whole) if behind_events else 0} of {file}" in caplog.text
    assert [path.read_bytes() for path in event_files.event_paths(tmp_path)] == ([whole] if behind_events else [])
    assert not (tmp_path / "it_ran").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two event files, of steps 1 to 3 and of steps 4 to 6."""
    for first in (1, 4):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{first}") as writer:
            for step in range(first, first + 3):
                writer.add_scalar("loss", 1 / step, step)
    return tmp_path


def steps(folder: Path) -> list[int]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars("loss")]


def up_to(last: int) -> Any:
    return lambda step, value: step <= last


def test_only_files_with_invalid_events_are_rewritten(folder: Path) -> None:
    first, second = event_files.event_paths(folder)
    before = (first.stat().st_ino, first.read_bytes())
    size = second.stat().st_size
    event_files.remove_events(folder, up_to(5))
    assert steps(folder) == [1, 2, 3, 4, 5]
    assert (first.stat().st_ino, first.read_bytes()) == before
    assert second.stat().st_size < size
    assert sorted(folder.iterdir()) == [first, second]


def test_a_file_without_values_is_deleted(folder: Path) -> None:
    first, _ = event_files.event_paths(folder)
    event_files.remove_events(folder, up_to(3))
    assert list(folder.iterdir()) == [first]


@pytest.mark.parametrize("cut", [1, 5, 20, 45])
def test_a_truncated_record_is_removed_and_those_before_it_stay(cut: int, folder: Path) -> None:
    _, second = event_files.event_paths(folder)
    second.write_bytes(second.read_bytes()[:-cut])
    event_files.remove_events(folder, up_to(9))
    remaining = steps(folder)
    assert remaining[:4] == [1, 2, 3, 4]
    assert len(remaining) < 6


def test_bytes_after_the_last_record_are_removed(folder: Path) -> None:
    _, second = event_files.event_paths(folder)
    content = second.read_bytes()
    second.write_bytes(content + b"\xff" * 40)
    event_files.remove_events(folder, up_to(9))
    assert second.read_bytes() == content
