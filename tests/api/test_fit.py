"""``distrain.fit`` in one process: the command's training, with objects, in a process that stays as it was."""

from __future__ import annotations

import gc
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import distrain
from distrain.api.surroundings import restored_surroundings
from distrain.cli import app
from distrain.cli.run_folder import RunFolder
from distrain.training.trainer import Trainer
from tests.api.models import SETTINGS, Skip, samples, skip_net
from tests.runs import LAUNCH, small


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(model: Any = None, train: Any = None, **changes: Any) -> distrain.Run:
    return distrain.fit(model or skip_net(), samples() if train is None else train, **{**SETTINGS, **changes})


def saved(run: distrain.Run) -> dict[str, Tensor]:
    return RunFolder.open(str(run.run_dir)).weights("newest").tensors


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Items(Dataset[tuple[Tensor, int]]):
    """The samples one by one."""

    def __init__(self, change: Callable[[int, Any], Any] = lambda place, item: item) -> None:
        self.inputs, self.labels = samples()
        self.change = change

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        item = (torch.from_numpy(self.inputs[place]), int(self.labels[place]))
        return self.change(place, item)  # type: ignore[no-any-return]


def test_the_command_trains_the_same_model_on_the_same_data(tmp_path: Path) -> None:
    config = small("trainer.max_steps=7", "trainer.memory_format=contiguous", f"run_dir={tmp_path / 'command'}")
    app.train(config)
    keys = {f"data.{name}": getattr(config.data, name) for name in ("channels", "height", "width", "classes", "noise")}
    keys |= {"data.train_size": 53, "data.test_size": 31, "data.eval_batch_size": 7}
    run = fit("simple_cnn", "synthetic", batch_size=10, epochs=30, max_steps=7, lr=config.optimizer.lr, keys=keys)
    assert equal(saved(run), saved(distrain.read_run(tmp_path / "command")))
    assert {path.name for path in run.run_dir.iterdir()} == {path.name for path in (tmp_path / "command").iterdir()}
    assert not run.model.training


def test_a_module_holds_its_trained_parameters_afterwards() -> None:
    model, (inputs, labels) = skip_net(), samples()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = fit(model, epochs=12)
    assert run.model is model
    assert equal(saved(run), model.state_dict())
    assert not equal(before, model.state_dict())
    assert run.summary["val_accuracy"] == run.summary["test_accuracy"]
    assert run.curve("val_accuracy")[1][-1] == pytest.approx(run.summary["val_accuracy"])
    with torch.no_grad():
        accuracy = (model(run.normalise(inputs)).argmax(1).numpy() == labels).mean()
    assert accuracy > 0.9
    assert "test_accuracy" in repr(run)
    with pytest.raises(
        distrain.ConfigError, match=r"no such metric was logged; choices: .* \(did you mean epoch/val_l"
    ):
        run.curve("val_los")


def test_samples_may_be_arrays_tensors_or_a_data_set() -> None:
    inputs, labels = samples()
    tensors = torch.from_numpy(inputs), torch.from_numpy(labels).int()
    kinds = [
        (inputs, labels),
        (inputs.astype(np.float64), labels.astype(np.uint8)),
        [inputs[::-1][::-1], labels.tolist()],
        tensors,
        TensorDataset(*tensors),
        Items(),
    ]
    first, *others = [saved(fit(train=train)) for train in kinds]
    for other in others:
        assert equal(first, other)


@pytest.mark.parametrize("task", ["multilabel", "regression", "segmentation"])
def test_targets_may_be_labels_numbers_or_masks(task: str) -> None:
    inputs, classes = samples()
    targets: Any = {
        "multilabel": np.stack((classes > 1, classes % 2), 1),
        "regression": torch.from_numpy(classes).bfloat16() / 2,
        "segmentation": (inputs[:, 0] > 1) * 255,
    }[task]
    pairs = Items(lambda place, item: (item[0], targets[place]))
    model = pixel_classes if task == "segmentation" else five_classes
    run = fit(model, (inputs, targets), task=task, epochs=1)
    assert equal(saved(run), saved(fit(model, pairs, task=task, epochs=1)))
    evaluated = distrain.evaluate(run, (inputs, targets), split="train")
    assert evaluated["count"] == 50
    name = {"multilabel": "macro_f1", "regression": "mse", "segmentation": "mean_iou"}[task]
    assert name in evaluated
    width = {"multilabel": 2, "regression": 1, "segmentation": 2}[task]
    assert len(RunFolder.open(str(run.run_dir)).spec.classes) == width
    assert len(distrain.predict(run, inputs)) == 50


def pixel_classes(num_classes: int) -> nn.Module:
    return nn.Conv2d(1, num_classes, 1)


def test_parts_of_the_samples_are_used_for_what_they_are_given() -> None:
    run = fit(val=samples(20, 1), test=samples(30, 2), classes=["a", "b", "c", "d", "e"], model=five_classes)
    log = (run.run_dir / "logs" / "rank_0.log").read_text()
    assert "50 samples to train on, 20 for validation, 30 to test" in log
    assert RunFolder.open(str(run.run_dir)).spec.classes == ("a", "b", "c", "d", "e")


def five_classes(num_classes: int, in_channels: int) -> nn.Module:
    assert torch.initial_seed() == 0, "a factory is called under the run's seed"
    return nn.Sequential(nn.Flatten(), nn.Linear(36 * in_channels, num_classes))


def test_pixels_are_normalised_as_those_of_image_files() -> None:
    inputs, labels = samples()
    run = fit(train=((inputs * 40 + 40).clip(0, 255).astype(np.uint8), labels))
    normal = run.normalise((inputs * 40 + 40).clip(0, 255).astype(np.uint8))
    assert abs(float(normal.mean())) < 0.1
    assert abs(float(normal.std()) - 1) < 0.1
    with pytest.raises(distrain.ConfigError, match="images: are float numbers; the run was trained on uint8 numbers"):
        run.normalise(inputs)


def test_a_run_that_was_stopped_goes_on_bit_for_bit() -> None:
    whole = fit(run_dir="whole", epochs=3)
    with pytest.raises(distrain.Stopped, match=r"stopped by .* at step 7"):
        fit(StopsAt(7), run_dir="stopped", epochs=3)
    log = Path("stopped/logs/rank_0.log").read_text()
    assert "to go on: distrain.fit(…, run_dir='stopped')" in log
    resumed = fit(StopsAt(-1), resume="stopped", epochs=3)
    assert {f"inner.{name}": tensor.tolist() for name, tensor in saved(whole).items()} == {
        name: tensor.tolist() for name, tensor in saved(resumed).items()
    }
    # Another start with other samples says so, and goes on.
    assert fit(StopsAt(-1), run_dir="stopped", epochs=4, train=samples(40)).summary["epochs"] == 4
    assert "THE DATA CHANGED" in Path("stopped/logs/rank_0.log").read_text()


class StopsAt(nn.Module):
    """Presses Ctrl-C in the forward pass of a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.inner, self.left = skip_net(), step

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and len(inputs) > 3:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
        return self.inner(inputs)  # type: ignore[no-any-return]


def test_the_process_is_afterwards_as_it_was() -> None:
    def state() -> dict[str, Any]:
        log = logging.getLogger("distrain")
        signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)]
        return {
            "threads": (torch.get_num_threads(), [thread.name for thread in threading.enumerate()]),
            "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),  # noqa: NPY002
            "log": (log.level, log.propagate, list(log.handlers)),
            "signals": signals,
            "environment": dict(os.environ),
            "folder": Path.cwd(),
            "hydra": GlobalHydra.instance().hydra,
            "warnings": list(warnings.filters),
            "collector": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
            "python": (list(sys.argv), sys.excepthook, threading.excepthook, list(sys.path)),
            "root log": (logging.getLogger().level, list(logging.getLogger().handlers), logging.raiseExceptions),
            "torch": (
                torch.get_default_dtype(),
                torch.are_deterministic_algorithms_enabled(),
                torch.get_float32_matmul_precision(),
                torch.backends.cudnn.benchmark,
                torch.backends.cudnn.deterministic,
                torch.is_grad_enabled(),
            ),
        }

    fit()
    first, second = skip_net(), fails_in_training()
    random.seed(5)
    torch.manual_seed(6)
    torch.set_num_threads(2)
    before = state()
    gc.collect()
    fit(first, seed=3)
    assert not any(type(living) is Trainer for living in gc.get_objects())
    with pytest.raises(distrain.Failed):
        fit(second)
    with pytest.raises(distrain.ConfigError):
        fit(first, strategy="pipeline")
    after = state()
    assert {name: after[name] for name in before if after[name] != before[name]} == {}


def fails_in_training() -> nn.Module:
    class Failing(Skip):
        steps = 0

        def forward(self, inputs: Tensor) -> Tensor:
            # In the trial of the model it runs fewer images at once.
            Failing.steps += self.training and len(inputs) > 3
            if Failing.steps > 6:
                raise RuntimeError("the model is tired")
            return super().forward(inputs)

    model = skip_net()
    model[1] = Failing(4)
    return model


def test_importing_distrain_imports_neither_torch_nor_hydra() -> None:
    code = "import sys, distrain; assert not {'torch', 'hydra', 'numpy'} & sys.modules.keys(); print(dir(distrain))"
    environment = {**os.environ, "PYTHONPATH": str(LAUNCH.parent)}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert "'fit'" in printed
    assert "'read_run'" in printed
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        distrain.fitt  # noqa: B018


X, Y = samples()
NAN = np.where(X > 3, np.nan, X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": 3}, r"train: is a int; pass a pair \(inputs, labels\)"),
        ({"train": X}, r"train: is a ndarray; pass a pair"),
        ({"train": (X,)}, r"train: is a tuple of 1; pass a pair"),
        ({"train": (X, Y[:-1])}, r"train: has 50 inputs and 49 labels"),
        ({"train": (X[:0], Y[:0])}, r"train: has no samples"),
        ({"train": (X[:, 0], Y)}, r"train: has inputs \[50, 6, 6\]; .* \(x\[:, None\] adds a channel\)"),
        ({"train": (X.reshape(50, 36), Y)}, r"\(x\[:, :, None, None\] makes columns channels\)"),
        ({"train": (X.transpose(0, 2, 3, 1), Y)}, r"look like \[N, H, W, C\]; .* x.transpose\(0, 3, 1, 2\)"),
        ({"train": (X.astype(int), Y)}, r"train: has inputs of int64; pass uint8 .* or float32"),
        ({"train": (NAN, Y)}, r"train\[\d+\]: has inputs that are NaN or infinite"),
        ({"train": (X.astype(object), Y)}, r"train: has inputs that are no numbers: a object array"),
        ({"train": (X, Y / 2)}, r"train: has labels of float64; pass class numbers as whole numbers"),
        ({"train": (X, Y[:, None])}, r"train: has labels \[50, 1\]; .*: pass y\[:, 0\]"),
        ({"train": (X, np.array(list("abcd"))[Y])}, r"train: has labels that are text; number them: .*np.unique"),
        ({"train": X}, r"train: is a ndarray; .*: train=\(inputs, labels\)"),
        ({"train": {"x": X, "y": Y}}, r"train: is a dict; .* such as train=\(train\['x'\], train\['y'\]\)"),
        ({"train": list(zip(X, Y, strict=True))}, r"train: is a list of 50; .* x, y = zip\(\*pairs\)"),
        ({"train": (pair for pair in zip(X, Y, strict=True))}, r"train: is a generator; .* x, y = zip\(\*pairs\)"),
        ({"val": 0.2}, r"val: is a float; .* pass keys={'data.val_fraction': 0.2}"),
        (
            {"train": Items(lambda place, item: dict(zip("xy", item, strict=True)))},
            r"train\[0\]: is a dict; .* of x, y",
        ),
        ({"train": Items(lambda place, item: (*item, place))}, r"train\[0\]: is a tuple of 3; items must be pairs"),
        ({"train": Items(lambda place, item: (item[0], np.eye(4)[0]))}, r"label array.*: return label.argmax\(\)"),
        (
            {"train": Items(lambda place, item: (item[0], 1.0))},
            r"has the label 1.0; .*: return int\(label\)",
        ),
        ({"model": skip_net().to("meta")}, r"model: has tensors on the meta device, .*; pass the class or function"),
        (
            {"optimizer": torch.optim.Adam},
            r"optimizer: must be the name .*, not Adam, such as optimizer='adam'",
        ),
        ({"loss": nn.CrossEntropyLoss()}, r"loss: must be the name of a choice, not CrossEntropyLoss, .*'loss.…'"),
        ({"devices": 2}, r"devices: no such keyword; it is called nproc here"),
        ({"epochs": 0}, r"trainer.epochs=0: must be at least 1"),
        ({"train": (X, np.eye(4)[Y])}, r"train: has labels \[50, 4\]; .* pass y.argmax\(1\)"),
        (
            {"train": (X, np.eye(4)[Y] + 1), "task": "multilabel"},
            r"train\[0\]: has a target that holds 2.0; a label is 0",
        ),
        ({"train": (X, NAN[:, 0]), "task": "regression"}, r"train: has a target that is float32 \[50, 6, 6\]; numbers"),
        ({"train": (X, NAN[:, 0, 0]), "task": "regression"}, r"train\[\d+\]: has a target that holds nan; a finite"),
        (
            {"train": (X, X[:, 0]), "task": "segmentation"},
            r"train: has a target that is float32 .*of whole numbers are",
        ),
        ({"train": (X, Y), "task": "segmentation"}, r"train: has a target that is int64 \[50\]; masks \[N, H, W\]"),
        (
            {"train": (X, np.uint8(X[:, 0, 1:] > 0)), "task": "segmentation"},
            r"train: has masks \[5, 6\] for images \[6, 6\]; they must have one size",
        ),
        (
            {"train": (X, X[:, 0, 0]), "val": (X, X[:, 0, 0, :2]), "task": "regression"},
            r"val: has 2 numbers a sample, and 6 are named",
        ),
        (
            {"train": Items(lambda place, item: (item[0], np.zeros(1 + place // 9))), "task": "regression"},
            r"train\[9\]: has a target \[2\], and the first \[1\]; make them alike",
        ),
        ({"train": (X, Y - 1)}, r"train: has labels from -1 to 2; classes are numbered from 0"),
        ({"train": DataLoader(Items())}, r"train: is a DataLoader; pass its data set, train=loader.dataset"),
        ({"train": iter([])}, r"train: is a list_iterator; pass a pair"),
        (
            {"train": Items(lambda place, item: item[:1] if place == 9 else item)},
            r"train\[9\]: is a tuple of 1; items",
        ),
        (
            {"train": Items(lambda place, item: (item[0][:, place // 9 :], 0))},
            r"train\[9\]: is float32 \[1, 5, 6\], and",
        ),
        ({"train": Items(lambda place, item: 1 / 0)}, r"train\[0\]: fails \(ZeroDivisionError: division by zero\)"),
        ({"train": Items(), "data.memory_limit_mb": 0}, r"data.memory_limit_mb=0: the 50 samples of Items need"),
        ({"val": (X[:, :, 1:], Y)}, r"val: has inputs \[1, 5, 6\], and train has \[1, 6, 6\]"),
        ({"val": (np.uint8(X), Y)}, r"val: has inputs of uint8, and train of float32"),
        ({"val": "digits"}, r"val: must be samples, as train is, not a name"),
        ({"train": "digits", "val": (X, Y)}, r"val: does not go with train='digits', which has its own; leave it out"),
        ({"train": "digitz"}, r"data=digitz: no such choice; .*\(did you mean digits\?\)"),
        ({"classes": 3}, r"classes=3: is too few: there are labels up to 3"),
        ({"classes": "abcd"}, r"classes=abcd: must be the number of classes, or a list"),
        ({"classes": 7}, r"model._target_=torch.*Sequential: returns \[2, 4\] .* outputs \[2, 7\] are needed"),
        ({"data.val_fraction": 0.0}, r"data.val_fraction=0.0: leaves no samples to test the model on; pass val="),
        ({"model": 3}, r"model: is a int; pass an nn.Module, a class or function"),
        ({"model": "resnet19"}, r"model=resnet19: no such choice; .*\(did you mean resnet18\?\)"),
        ({"model": nn.DataParallel(skip_net())}, r"model: is a DataParallel; pass its module, model.module"),
        ({"model": lambda: None}, r"<lambda>: makes a NoneType, not an nn.Module"),
        ({"model": lambda depth: None}, r"model.kwargs=.*<lambda> missing a required argument: 'depth'"),
        ({"strategy": "dpp"}, r"strategy=dpp: no such choice; .*\(did you mean ddp\?\)"),
        ({"strategy": 3}, r"strategy: must be the name of a choice, not int, such as strategy='ddp'"),
        ({"strategy": "pipeline"}, r"on 2 ranks: distrain.fit\(…, nproc=2\)"),
        ({"lrr": 3}, r"lrr: no such key"),
        ({"optimizer.lrr": 3}, r"optimizer.lrr: no such key; .*\(did you mean lr\?\)"),
        ({"lr": -1}, r"optimizer.lr=-1(.0)?: must be greater than 0"),
        ({"epochs": "many"}, r"trainer.epochs=many: must be a whole number"),
        ({"lr": object()}, r"optimizer.lr.*: .*object.* is not a supported primitive type"),
        ({"keys": {"optimizer.lr": 1}}, r"optimizer.lr=1: is given twice"),
        ({"data": "digits"}, r"data: can't be set here: it says which objects fit\(\) was given"),
        ({"device": "tpu"}, r"runtime.device=tpu: unknown choice; choices: auto, cpu, cuda, mps"),
        ({"nproc": 0}, r"nproc=0: must be a whole number from 1 on"),
        ({"nproc": True}, r"nproc=true: must be a whole number from 1 on"),
        ({"config_dir": "nowhere"}, r"config_dir=nowhere: is not a folder"),
        ({"resume": "nowhere"}, r"resume=nowhere: is not a checkpoint's folder"),
        ({"logger": "nonne"}, r"logger=nonne: no such choice"),
    ],
)
def test_a_mistake_is_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(distrain.ConfigError) as refused:
        fit(**arguments)
    assert re.search(message, str(refused.value)), refused.value
    assert "\n" not in str(refused.value)
    assert not Path("outputs").exists()


def test_generators_of_gpus_in_use_are_afterwards_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    states, used = [torch.tensor([1]), torch.tensor([2])], True
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda earlier: states.__setitem__(slice(None), earlier))
    with restored_surroundings():
        states[:] = [torch.tensor([3]), torch.tensor([4])]
    assert [int(state) for state in states] == [1, 2]
    used = False
    with restored_surroundings():
        states[:] = [torch.tensor([5]), torch.tensor([6])]
    assert [int(state) for state in states] == [5, 6], "a GPU that was not in use is not taken into use"
