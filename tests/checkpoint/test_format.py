"""Checkpoints in a run's folder are told from everything else by their names."""

from __future__ import annotations

from pathlib import Path

from distrain.checkpoint import format as checkpoint_format
from tests.checkpoint.helpers import save_steps


def test_only_checkpoints_are_listed_in_order_of_step(tmp_path: Path) -> None:
    save_steps(tmp_path, 200, 30, 1000)
    (tmp_path / ".step_00002000.123").mkdir()
    (tmp_path / "step_00003000.old").mkdir()
    (tmp_path / "step_00004000").write_text("no folder")
    names = [path.name for path in checkpoint_format.list_checkpoints(tmp_path)]
    assert names == ["step_00000030", "step_00000200", "step_00001000"]
    assert checkpoint_format.list_checkpoints(tmp_path / "nowhere") == []
