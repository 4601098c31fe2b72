"""Averages of the model, and optimizers of many kinds, are the same on any ranks and after a resume."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distrain
from distrain.checkpoint import reader as checkpoint_reader
from distrain.cli import app
from distrain.errors import ConfigError
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training.callbacks import Callback
from tests.harness import run_ranks, soaked
from tests.runs import NormNet, check, relative_difference, small, trainer_for

#: An epoch is five steps, the last of seven images: 48 to train on.
STEPS, SAVED = 20, 13
BATCH_NORM = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=batch")
GROUP_NORM = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=group")
SHARED = (
    "trainer.precision=fp64",
    f"trainer.max_steps={STEPS}",
    "trainer.epochs=4",
    "scheduler=constant",
    "checkpoint.every_epochs=100",
    f"checkpoint.every_steps={SAVED}",
    # Sizes of buckets by measurement take longer than the steps.
    "trainer.deterministic=true",
    "optimizer.weight_decay=0.1",
)
AVERAGES = ("trainer.ema.decay=0.9", "trainer.ema.every=2", "trainer.swa.from_epoch=2")
RECIPES = {
    "averages": (*BATCH_NORM, *AVERAGES, "optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.05"),
    "lamb": (*GROUP_NORM, "optimizer=lamb", "optimizer.lr=0.01", "optimizer.no_decay=[norm,bias]"),
    "lars": (*GROUP_NORM, "optimizer=lars", "optimizer.trust_coefficient=0.01"),
    "lion": (*GROUP_NORM, "optimizer=lion", "optimizer.lr=0.001"),
    "schedule-free": (*GROUP_NORM, "optimizer=schedule_free_adamw", "optimizer.eps=1e-3"),
    "sharpness-aware": (*BATCH_NORM, "optimizer=sgd", "optimizer.sam_rho=0.1", "trainer.grad_clip_norm=1"),
}
LAYOUTS = {
    "ddp": (3, ("strategy=ddp",)),
    "pipeline": (2, ("strategy=pipeline", "strategy.schedule=gpipe", "strategy.microbatches=1")),
    "fsdp": (3, ("strategy=fsdp", "strategy.block_mb=1e-4")),
    "fsdp of gradients": (3, ("strategy=fsdp", "strategy.shard=gradients")),
    "tensor_parallel": (3, ("strategy=tensor_parallel",)),
}
#: Where not all recipes can be trained: those that update element by element and look at nothing else, and of these the
#: one with a model that three ranks can divide.
SOME_RECIPES = {
    "fsdp": ("averages", "lion"),
    "fsdp of gradients": ("averages", "lion"),
    "tensor_parallel": ("averages",),
}
#: Where the model is.
ALLOW = ["tests.runs"]
#: What computes on another number of ranks, and what adds up in another order.
BOUND = 1e-10


def train_all(runs: list[tuple[str, ...]]) -> None:
    """Trains one after another, as a rank."""
    for options in runs:
        configuration = small(*options)
        with Runtime(configuration, World.from_environment()) as runtime:
            trainer_for(configuration, runtime).fit()


def saved(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    """The model and the averages of a checkpoint; the optimizer's state too."""
    state = checkpoint_reader.load(folder / "checkpoints" / f"step_{step:08d}")[0]
    parts = ("model", "average", "optimizer")
    return {f"{part}/{name}": tensor for part in parts for name, tensor in state[part].items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of each recipe in one process."""
    folder = tmp_path_factory.mktemp("recipes")
    train_all([(*SHARED, *options, f"run_dir={folder}/single/{name}") for name, options in RECIPES.items()])
    return folder


def recipes_of(*layouts: str | None) -> list[str]:
    """Names of the recipes that all of these layouts train."""
    return [name for name in RECIPES if all(name in SOME_RECIPES.get(layout or "", RECIPES) for layout in layouts)]


def train_in(folder: Path, layout: str, source: str | None = None) -> None:
    """Trains the recipes in a layout; from the middle on where the checkpoints of another layout are given."""
    ranks, strategy = LAYOUTS[layout]
    runs = []
    for name in recipes_of(layout, source):
        options = RECIPES[name]
        middle = () if source is None else (f"resume={folder}/{source}/{name}/checkpoints/step_{SAVED:08d}",)
        target = layout if source is None else f"{layout} from {source}"
        runs.append((*SHARED, *options, *strategy, *middle, f"run_dir={folder}/{target}/{name}"))
    run_ranks(train_all, ranks, runs)


def summary(folder: Path) -> dict[str, Any]:
    """The counts of a run's summary."""
    content = json.loads((folder / "summary.json").read_text())
    return {key: content.get(key) for key in ("test_correct", "test_count", "test_ema_correct", "test_swa_correct")}


#: Each layout resumed in itself, so also whole, and resumed from others.
ALWAYS = [("ddp", "ddp"), ("pipeline", "single"), ("fsdp", "fsdp of gradients"), ("tensor_parallel", "single")]
CASES = [*((layout, source) for layout in LAYOUTS for source in (layout, "single")), ALWAYS[2], ("ddp", "fsdp")]


@pytest.mark.parametrize("case", soaked(CASES, ALWAYS), ids=str)
def test_recipes_are_the_same_on_ranks_and_after_a_resume(case: tuple[str, str], folder: Path) -> None:
    layout, source = case
    target = f"{layout} from {source}"
    if not (folder / source).exists():
        train_in(folder, source)
    train_in(folder, layout, source)
    for name in recipes_of(layout, source):
        run = folder / target / name
        assert relative_difference(saved(run), saved(folder / "single" / name)) <= BOUND, name
        assert summary(run) == summary(folder / "single" / name)
        if source == layout:
            whole, resumed = saved(folder / layout / name), saved(run)
            assert whole.keys() == resumed.keys()
            assert all(torch.equal(whole[key], resumed[key]) for key in whole), name


class Models(Callback):
    """Copies of the model after each step."""

    def __init__(self) -> None:
        self.models: list[dict[str, Tensor]] = []

    def on_step_end(self, run: Any) -> None:
        self.models.append({name: tensor.clone() for name, tensor in run.strategy.model_state().items()})


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    run_dir, callback = tmp_path_factory.mktemp("watched"), Models()
    keys = ("trainer.ema.every=1", "checkpoint.every_epochs=1", f"run_dir={run_dir}")
    config = small(*SHARED, *RECIPES["averages"], *keys)
    with app.prepared(config) as trainer:
        trainer.callbacks.append(callback)
        trainer.fit()
    return run_dir, callback.models


def test_averages_are_those_of_their_formulas(watched: tuple[Path, list[dict[str, Tensor]]]) -> None:
    run_dir, models = watched
    expected = dict(models[0])
    for index, model in enumerate(models[1:], 1):
        decay = min(0.9, 1 - (1 + index) ** (-2 / 3))
        expected = {name: decay * expected[name] + (1 - decay) * tensor for name, tensor in model.items()}
    found = saved(run_dir)
    assert "average/ema/first.1.running_var" in found
    mean = {name: (models[9][name] + models[14][name] + models[19][name]) / 3 for name in models[0]}
    names = [name for name, tensor in models[0].items() if tensor.is_floating_point()]
    measured = measured_by_torch(run_dir, mean)
    assert not torch.allclose(measured["first.1.running_var"], mean["first.1.running_var"])
    for name in names:
        torch.testing.assert_close(found[f"average/ema/{name}"], expected[name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[f"average/swa/{name}"], measured[name], rtol=1e-12, atol=1e-14)


def measured_by_torch(run_dir: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state whose BatchNorm statistics torch measures on the run's training data."""
    with app.prepared(small(*SHARED, *RECIPES["averages"], f"run_dir={run_dir}/again")) as trainer:
        batches = [batch.inputs for batch in trainer.loaders["train"].epoch(0)]
    model = NormNet(batches[0].shape[1], len(state["head.2.bias"]), "batch").double()
    model.load_state_dict(state)
    # The last one is smaller.
    torch.optim.swa_utils.update_bn(batches[:-1], model)
    return model.state_dict()


def test_statistics_of_an_average_may_be_averaged_too(tmp_path: Path) -> None:
    callback = Models()
    keys = ("trainer.swa.batchnorm=averaged", "trainer.max_steps=15", f"run_dir={tmp_path}")
    with app.prepared(small(*SHARED, *RECIPES["averages"], *keys)) as trainer:
        trainer.callbacks.append(callback)
        trainer.fit()
    mean = (callback.models[9]["first.1.running_var"] + callback.models[14]["first.1.running_var"]) / 2
    torch.testing.assert_close(saved(tmp_path, 15)["average/swa/first.1.running_var"], mean)


def test_an_average_is_evaluated_monitored_and_exported(
    watched: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    run_dir, _ = watched
    run = distrain.read_run(run_dir, allow=ALLOW)
    assert run.summary["monitor"] == "val/ema_accuracy"
    assert run.summary["best_val_ema_accuracy"] == max(run.curve("val_ema_accuracy")[1])
    for kind, prefix in (("last", "test_"), ("ema", "test_ema_"), ("swa", "test_swa_")):
        found = distrain.evaluate(run, weights=kind, allow=ALLOW)
        assert found["accuracy"] == pytest.approx(run.summary[f"{prefix}accuracy"], abs=0)
        assert found["loss"] == pytest.approx(run.summary[f"{prefix}loss"], rel=1e-5)
    assert run.summary["test_ema_loss"] != run.summary["test_loss"]
    # Until it begins, SWA is the model.
    metrics = {row["epoch"]: row for row in run.metrics if "epoch/val_swa_loss" in row}
    assert metrics[1]["epoch/val_swa_loss"] == metrics[1]["epoch/val_loss"]
    assert metrics[4]["epoch/val_swa_loss"] != metrics[4]["epoch/val_loss"]
    from safetensors.torch import load_file

    exported = load_file(distrain.export(run, tmp_path / "ema.safetensors", weights="ema", allow=ALLOW))
    model = distrain.load_model(run, weights="ema", allow=ALLOW).state_dict()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, model[name])
        expected = saved(run_dir).get(f"average/ema/{name}")
        if expected is not None:
            torch.testing.assert_close(tensor, expected.float())
    with pytest.raises(ConfigError, match=r"weights=foo: unknown choice"):
        distrain.evaluate(run, weights="foo")


def test_a_run_without_averages_goes_on_with_them_and_back(tmp_path: Path) -> None:
    options = (*SHARED, *BATCH_NORM, "optimizer=sgd", f"run_dir={tmp_path}/run")
    app.train(small(*options, "trainer.max_steps=3"))
    with pytest.raises(ConfigError, match="holds no such average; choices: last"):
        distrain.evaluate(tmp_path / "run", weights="ema")
    app.train(small(*options, *AVERAGES, "trainer.max_steps=6"))
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "none was saved; it begins with this run's model" in log
    app.train(small(*options, "trainer.max_steps=7"))
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert re.search(r"average ema +reset +this run keeps none", log)


def local_average(configuration: Any) -> dict[str, Any]:
    """This rank's average at the end of a run, and the summary."""
    with app.prepared(configuration) as trainer:
        summary = trainer.fit()
        averages = {each.name: each.tensors for each in trainer.averages._averages}
    return {"summary": summary, "ema": averages.get("ema", {})}


@pytest.mark.parametrize(
    "strategy",
    [
        ("strategy=local_sgd", "strategy.sync_every=3"),
        ("strategy=ddp", "strategy.batchnorm=local"),
        ("strategy=parameter_server",),
    ],
    ids=lambda keys: keys[0],
)
def test_ranks_whose_models_differ_have_the_mean_of_their_averages(strategy: tuple[str, ...], tmp_path: Path) -> None:
    options = (*SHARED, *RECIPES["averages"], *strategy, f"run_dir={tmp_path}")
    ranks = run_ranks(local_average, 3, small(*options))
    found = saved(tmp_path)
    for rank in ranks:
        for name, tensor in rank["ema"].items():
            torch.testing.assert_close(tensor, found[f"average/ema/{name}"], rtol=1e-12, atol=1e-14)
    evaluated = distrain.evaluate(tmp_path, weights="ema", allow=ALLOW)
    assert evaluated["loss"] == pytest.approx(ranks[0]["summary"]["test_ema_loss"], rel=1e-6)


REFUSED = {
    "strategy=ddp trainer.swa.from_epoch=9": r"trainer\.swa\.from_epoch=9: is after the last epoch, trainer\.epochs=4",
    "strategy=ddp optimizer=schedule_free_adamw trainer.ema.decay=0.9": "schedule_free_adamw averages by itself",
    "strategy=local_sgd optimizer=schedule_free_adamw": "can't switch the parameters of all ranks to their averages",
    "strategy=local_sgd optimizer.sam_rho=0.1": "strategy=local_sgd can't make a step of two passes; choices: null",
    "strategy=ddp compression=topk optimizer.sam_rho=0.1": "compression=topk keeps errors of one",
    "strategy=parameter_server strategy.mode=async trainer.ema.decay=0.9": "mode=sync averages",
}


@pytest.mark.parametrize("keys", REFUSED)
def test_what_can_not_be_done_is_refused_in_one_line(keys: str) -> None:
    world = World(rank=0, size=2, local_rank=0, local_size=2, host="here")
    with pytest.raises(ConfigError, match=REFUSED[keys]):
        check(small("trainer.epochs=4", *keys.split()), world)


def plateau_rates(folder: Path, *options: str) -> dict[int, float]:
    """The learning rate of each step."""
    keys = ("scheduler=plateau", "scheduler.patience=0", "scheduler.factor=0.5", "scheduler.final_factor=0.2")
    app.train(small(*keys, "trainer.monitor=val/loss", "trainer.mode=max", f"run_dir={folder}", *options))
    return dict(zip(*distrain.read_run(folder).curve("train/learning_rate"), strict=True))


def test_plateau_goes_by_the_monitor_and_on_after_a_resume(tmp_path: Path) -> None:
    # More is said to be better of a loss that falls, so each epoch but the first is without improvement.
    options = ("optimizer=sgd", "optimizer.lr=0.01", "trainer.epochs=6", "trainer.log_every_steps=1")
    rates = plateau_rates(tmp_path / "whole", *options)
    assert [rates[step] for step in (1, 10, 11, 16, 21, 26, 30)] == pytest.approx(
        [0.01, 0.01, 0.005, 0.0025, 0.002, 0.002, 0.002]
    )
    plateau_rates(tmp_path / "parts", *options, "trainer.max_steps=13")
    again = plateau_rates(tmp_path / "parts", *options)
    assert {step: again[step] for step in range(14, 31)} == {step: rates[step] for step in range(14, 31)}
