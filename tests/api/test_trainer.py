"""``distrain.Trainer``: step by step, a program trains what ``distrain.fit`` trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distrain
from tests.api.models import SETTINGS, samples, skip_net


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_steps_that_a_program_takes_train_what_fit_trains() -> None:
    whole, stepped = skip_net(), skip_net()
    expected = distrain.fit(whole, samples(), **SETTINGS)
    with distrain.Trainer(stepped, samples(), **SETTINGS) as trainer:
        taken = list(trainer)
    assert taken == list(range(1, expected.summary["steps"] + 1))
    assert torch.equal(parameters(stepped), parameters(whole))
    for name in ("test_accuracy", "test_loss", "train_loss", "epochs"):
        assert trainer.run.summary[name] == expected.summary[name]
    assert trainer.epoch == SETTINGS["epochs"]


def test_an_evaluation_or_a_save_between_steps_changes_nothing() -> None:
    whole, watched = skip_net(), skip_net()
    distrain.fit(whole, samples(), **SETTINGS)
    with distrain.Trainer(watched, samples(), run_dir="run", **SETTINGS) as trainer:
        for step in trainer:
            assert step == trainer.step
            assert {"loss", "count", "accuracy"} <= trainer.evaluate("val").keys()
            if step == 2:
                trainer.save()
                assert Path("run/checkpoints/step_00000002").is_dir()
        with pytest.raises(distrain.ConfigError, match="split=vall"):
            trainer.evaluate("vall")
    assert torch.equal(parameters(watched), parameters(whole))


def test_a_program_that_leaves_the_loop_has_saved_and_goes_on() -> None:
    whole, parts = skip_net(), skip_net()
    expected = distrain.fit(whole, samples(), **SETTINGS)
    with distrain.Trainer(parts, samples(), run_dir="run", **SETTINGS) as trainer:
        for step in trainer:
            if step == 3:
                break
    assert Path("run/checkpoints/step_00000003").is_dir()
    assert trainer.run.summary == {}
    with distrain.Trainer(parts, samples(), run_dir="run", **SETTINGS) as trainer:
        assert min(trainer) == 4
    assert torch.equal(parameters(parts), parameters(whole))
    assert trainer.run.summary["steps"] == expected.summary["steps"]


def test_an_error_between_steps_is_a_failure_of_the_run() -> None:
    def fail(step: int) -> None:
        raise ValueError(f"of the program at step {step}")

    with pytest.raises(distrain.Failed) as failed, distrain.Trainer(skip_net(), samples(), **SETTINGS) as trainer:
        fail(next(iter(trainer)))
    assert isinstance(failed.value.__cause__, ValueError)
    with distrain.Trainer(skip_net(), samples(), **SETTINGS) as trainer:
        pass
    with pytest.raises(distrain.ConfigError, match="if steps were taken"):
        _ = trainer.run


def test_what_has_no_steps_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(distrain.ConfigError, match="start it under torchrun"):
        distrain.Trainer(skip_net(), samples(), nproc=2, **SETTINGS)
    with pytest.raises(distrain.ConfigError, match="ranks that take no steps of their own"):
        distrain.Trainer(skip_net(), samples(), strategy="parameter_server", **SETTINGS)
    with pytest.raises(distrain.ConfigError, match=r"is used inside the block of `with"):
        distrain.Trainer(skip_net(), samples(), **SETTINGS).save()
