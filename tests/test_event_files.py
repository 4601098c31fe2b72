"""Event files: what isn't TensorBoard's is named, left out, and never run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from distrain import event_files


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("behind_events", [False, True])
def test_what_is_no_event_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, behind_events: bool
) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 1)
    (file,) = event_files.files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes((whole if behind_events else b"") + pickle.dumps(Bomb(tmp_path / "it_ran")))
    event_files.leave_out(tmp_path, lambda step, value: True)
    assert f"left out what stands in {file} after byte {len(whole) if behind_events else 0}" in caplog.text
    assert [path.read_bytes() for path in event_files.files(tmp_path)] == ([whole] if behind_events else [])
    assert not (tmp_path / "it_ran").exists()
