"""Pruning during a training: its schedule, and what a pruned run gives to who reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

import distrain
from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.cli import app
from distrain.errors import ConfigError
from distrain.training.pruning import rounds
from tests.runs import compose, small

#: Three rounds in the first five of ten steps.
KEYS = ("model=simple_cnn", "trainer.epochs=2", "optimizer.lr=0.003", "prune.amount=0.6", "prune.rounds=3")


def test_the_share_rises_by_a_cubic_and_reaches_its_amount_at_the_end_of_its_epochs() -> None:
    def found(*keys: str, steps_per_epoch: int = 8, total_steps: int = 40) -> dict[int, float]:
        config = compose("prune.amount=0.8", "trainer.epochs=5", *keys)
        return rounds(config, steps_per_epoch, total_steps)

    rising = found("prune.rise_epochs=1.5", "prune.rounds=4")
    assert [*rising] == [3, 6, 9, 12]
    assert rising[12] == 0.8
    assert [rising[step] for step in (3, 6, 9)] == pytest.approx([0.8 * (1 - part**3) for part in (0.75, 0.5, 0.25)])
    assert found("prune.rise_epochs=0") == {0: 0.8}
    assert max(found("prune.rounds=3")) == 20
    assert found("prune.rounds=9", steps_per_epoch=1, total_steps=5)[2] == 0.8
    assert not found("prune.amount=null")
    with pytest.raises(
        ConfigError, match=r"prune.rise_epochs=5.0: is not less than trainer.epochs=5: no epoch is left"
    ):
        found("prune.rise_epochs=5")


def zeros(tensors: dict[str, Tensor], names: list[str]) -> int:
    return sum(int((tensors[name] == 0).sum()) for name in names)


def test_a_pruned_run_is_evaluated_exported_and_trained_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    summary = app.train(small(*KEYS, "trainer.ema.decay=0.9", f"run_dir={run_dir}"))
    saved = checkpoint_reader.load_model(checkpoint_format.list_checkpoints(run_dir / "checkpoints")[-1])
    names = [name.replace("prune_mask", "weight") for name in saved if name.endswith("prune_mask")]
    total = sum(saved[name].numel() for name in names)
    assert summary["pruned"] == {"weights": total, "zero": round(0.6 * total)}
    assert "output.weight" not in names
    for kind, prefix in (("last", "test_"), ("ema", "test_ema_")):
        assert distrain.evaluate(run_dir, weights=kind)["accuracy"] == summary[f"{prefix}accuracy"]
        exported = load_file(distrain.export(run_dir, tmp_path / f"{kind}.safetensors", weights=kind))
        assert exported.keys() == {name for name in saved if not name.endswith("prune_mask")}
        assert zeros(exported, names) == summary["pruned"]["zero"]
    # Trained on, what is zero stays so if the new run is pruned too; otherwise all weights are trained again.
    start = (*KEYS, f"init.weights={run_dir}", "trainer.max_steps=4", "optimizer.lr=0.01")
    app.train(small(*start, "prune.amount=0.1", f"run_dir={tmp_path}/again"))
    again = load_file(distrain.export(tmp_path / "again", tmp_path / "again.safetensors"))
    assert zeros(again, names) == summary["pruned"]["zero"]
    log = (tmp_path / "again" / "logs" / "rank_0.log").read_text()
    assert "of the model's 11 tensors" in log
    assert "left over" not in log
    app.train(small(*start, "prune.amount=null", f"run_dir={tmp_path}/dense"))
    dense = load_file(distrain.export(tmp_path / "dense", tmp_path / "dense.safetensors"))
    assert zeros(dense, names) < summary["pruned"]["zero"] / 2
    assert "left over" not in (tmp_path / "dense" / "logs" / "rank_0.log").read_text()
