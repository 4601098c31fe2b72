"""Whatever state.json says, a run resumes as it would have, or from the checkpoint before, or is refused in a line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.checkpoint.format import checkpoint_path, checkpoints_folder
from distrain.errors import ConfigError
from distrain.runtime.runtime import Runtime
from distrain.training import resume
from tests.checkpoint.helpers import rewrite
from tests.checkpoint.test_state_schema import HOSTILE, LEFT_OUT, places, with_value
from tests.runs import small, trainer_for
from tests.strategies.helpers import ALONE

OPTIONS = ("optimizer=sgd", "optimizer.momentum=0.9", "trainer.epochs=2", "checkpoint.every_steps=2")
#: Keys of the saved configuration that are tried, besides its sections.
CONFIG_KEYS = {"name", "seed", "lr", "batch_size", "epochs", "_target_"}
#: What decides how training goes on; the rest of the position is for reports.
STEERS = ("step", "epoch", "epoch_samples", "epoch_sums", "best_step", "best_score")


VALUES = [HOSTILE[name] for name in ("null", "terminal", "negative", "2^40", "10^400", "empty list", "mapping")] + [
    LEFT_OUT
]
#: A run may have saved any finite number as these.
PLAUSIBLE = {"best_score", "epoch_sums", "best_step"}


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after 8 of 10 steps, with checkpoints of steps 4, 6 and 8."""
    path = tmp_path_factory.mktemp("hostile")
    config = small(*OPTIONS, f"run_dir={path}", "trainer.max_steps=8")
    with Runtime(config, ALONE) as runtime:
        trainer_for(config, runtime).fit()
    return path


def test_no_value_of_any_field_leads_to_another_training(folder: Path) -> None:
    config = small(*OPTIONS, f"run_dir={folder}")
    newest, older = (checkpoint_path(checkpoints_folder(folder), step) for step in (8, 6))
    original = json.loads((newest / "state.json").read_text())
    tried = [place for place in places(original) if place[0] != "config" or len(place) < 3 or place[-1] in CONFIG_KEYS]
    outcomes: dict[str, int] = {"the same": 0, "the older one": 0, "refused": 0}
    warnings = Warnings()
    with Runtime(config, ALONE) as runtime:
        trainer = trainer_for(config, runtime)
        strategy, task = trainer.strategy, trainer.task
        logging.getLogger("distrain").addHandler(warnings)

        def resumed() -> tuple[Path, dict[str, Any], dict[str, Any]]:
            with torch.no_grad():
                for tensor in strategy.model_state().values():
                    tensor.zero_()
            strategy.optimizer.state.clear()
            found = resume.resume(config, runtime, strategy, trainer.averages, task, 48)
            assert found is not None
            tensors = {name: tensor.clone() for name, tensor in strategy.model_state().items()}
            tensors |= {name: tensor.clone() for name, tensor in strategy.state_dict()["optimizer"].items()}
            return found.path, tensors, {name: getattr(found.progress, name) for name in STEERS}

        path, tensors, position = resumed()
        assert path == newest
        for place in tried:
            for value in VALUES:
                warnings.lines.clear()
                refusal = ""
                rewrite(newest, "state.json", json.dumps(with_value(original, place, value)).encode())
                try:
                    resume.check(config)
                    path, found, found_position = resumed()
                except ConfigError as error:
                    refusal = str(error)
                if refusal:
                    outcomes["refused"] += 1
                    assert place[0] == "config", (place, value, refusal)
                    assert "was saved with another configuration" in refusal
                    assert "\n" not in refusal
                    assert len(refusal) < 2000
                elif path == older:
                    outcomes["the older one"] += 1
                    assert len(warnings.lines) == 1, (place, value, warnings.lines)
                    assert warnings.lines[0].startswith(f"checkpoint left out: {newest}")
                else:
                    outcomes["the same"] += 1
                    assert path == newest
                    assert found.keys() == tensors.keys()
                    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors.items()), (place, value)
                    differs = {name for name in STEERS if found_position[name] != position[name]}
                    assert differs <= PLAUSIBLE & {place[-1]}, (place, value)
        logging.getLogger("distrain").removeHandler(warnings)
    assert all(count >= 10 for count in outcomes.values()), outcomes
