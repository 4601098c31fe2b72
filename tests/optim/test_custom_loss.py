"""loss=custom: what a loss gives is found out by a trial, and what can't be added up is refused in one line."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrain.data.base import IGNORED, DataSpec
from distrain.errors import ConfigError
from distrain.optim import custom_loss
from distrain.optim.losses import CustomLossConfig, Loss, build

HERE = __name__
OUTPUTS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLASSES = torch.tensor([0, 2, 1, 1, 2])


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def total(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def of_each(outputs: Tensor, targets: Tensor, factor: float = 1.0) -> Tensor:
    return factor * F.cross_entropy(outputs, targets, reduction="none")


class Tempered:
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs / self.temperature, targets)


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(3))


class Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(outputs, targets)


def mixing(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - outputs.mean(0)).square().sum()


def mixing_each(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - outputs.mean(0)).square().sum(1)


def number(outputs: Tensor, targets: Tensor) -> float:
    return 3.0


def detached(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.detach().sum()


def of_each_class(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.cat([outputs.sum(0), outputs.sum(0)])


def broken(outputs: Tensor, targets: Tensor) -> Tensor:
    raise KeyError("temperature")


def nan(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sum() * float("nan")


def zero(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - 100).relu().sum()


def make(path: str, kind: str = "class", **kwargs: Any) -> Loss:
    spec = DataSpec(3, 9, 2, ("a", "b", "c"), target=kind)
    full = path if "." in path else f"{HERE}.{path}"
    return build(CustomLossConfig(name="custom", _target_=full, kwargs=kwargs), spec)


@pytest.mark.parametrize(
    ("path", "kwargs"),
    [
        ("mean", {}),
        ("total", {}),
        ("of_each", {}),
        ("Tempered", {"temperature": 1.0}),
        ("torch.nn.CrossEntropyLoss", {}),
        ("torch.nn.CrossEntropyLoss", {"reduction": "sum"}),
        ("torch.nn.functional.cross_entropy", {}),
    ],
)
def test_the_sum_is_the_same_however_the_loss_gives_it(path: str, kwargs: dict[str, Any]) -> None:
    loss = make(path, **kwargs)
    expected = F.cross_entropy(OUTPUTS, CLASSES, reduction="sum")
    for sizes in ((5,), (1, 4), (2, 0, 3)):
        parts = zip(OUTPUTS.split(sizes), CLASSES.split(sizes), strict=True)
        torch.testing.assert_close(torch.stack([loss(*part) for part in parts]).sum(), expected)


@pytest.mark.parametrize(
    ("path", "kind", "kwargs", "like"),
    [
        ("torch.nn.BCEWithLogitsLoss", "labels", {}, F.binary_cross_entropy_with_logits),
        ("torch.nn.MultiLabelSoftMarginLoss", "labels", {}, F.multilabel_soft_margin_loss),
        ("torch.nn.SmoothL1Loss", "numbers", {"beta": 0.5}, lambda o, t: F.smooth_l1_loss(o, t, beta=0.5)),
    ],
)
def test_several_numbers_of_a_sample_are_averaged_as_torchs_mean_does(
    path: str, kind: str, kwargs: dict[str, Any], like: Any
) -> None:
    targets = (OUTPUTS > 0).to(torch.uint8) if kind == "labels" else OUTPUTS.flip(0).float()
    loss = make(path, kind, **kwargs)
    torch.testing.assert_close(loss(OUTPUTS, targets) / 5, like(OUTPUTS, targets.double()))


def test_lists_called_weight_become_tensors_of_the_outputs_type() -> None:
    loss = make("torch.nn.CrossEntropyLoss", weight=[1, 2, 0.5])
    expected = F.cross_entropy(OUTPUTS, CLASSES, torch.tensor([1, 2, 0.5]).double(), reduction="sum")
    torch.testing.assert_close(loss(OUTPUTS, CLASSES), expected)


def test_a_mask_reaches_the_loss_as_class_numbers() -> None:
    loss = make("torch.nn.CrossEntropyLoss", "mask", ignore_index=IGNORED)
    outputs, masks = torch.randn(2, 3, 9, 2), torch.full((2, 9, 2), 1, dtype=torch.uint8)
    torch.testing.assert_close(loss(outputs, masks) / 2, F.cross_entropy(outputs, masks.long()))
    masks[:, :4] = IGNORED
    torch.testing.assert_close(
        loss(outputs, masks) / 2, F.cross_entropy(outputs, masks.long(), ignore_index=IGNORED), msg="as torch's mean"
    )


@pytest.mark.parametrize("path", ["mean", "of_each", "torch.nn.MSELoss"])
def test_an_empty_batch_gives_zero_and_a_gradient(path: str) -> None:
    outputs = torch.zeros(0, 3, requires_grad=True)
    kind = "numbers" if path == "torch.nn.MSELoss" else "class"
    loss = make(path, kind)(outputs, torch.zeros(0, 3) if kind == "numbers" else torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert outputs.grad is not None


@pytest.mark.parametrize(
    ("path", "kind", "kwargs", "message"),
    [
        ("mixing", "class", {}, "a sample's loss depends on the other samples"),
        ("mixing_each", "class", {}, "a sample's loss depends on the other samples"),
        ("number", "class", {}, "gives a float for outputs [3, 3] and targets [3]; a tensor of real numbers is needed"),
        ("detached", "class", {}, "doesn't depend on the outputs in a way that can be trained"),
        ("of_each_class", "class", {}, "gives [6] for outputs [3, 3] and targets [3]; one number, or one for each"),
        ("broken", "class", {}, "fails for outputs [3, 3] and targets [3] (KeyError: 'temperature') at "),
        ("nan", "class", {}, "gives NaN or an infinite number"),
        ("zero", "class", {}, "gives 0 for random outputs, so nobody can tell"),
        ("Trained", "class", {}, "has parameters, which nobody would train; make them part of the model"),
        ("Counting", "class", {}, "changes its buffers, which no checkpoint holds and ranks don't share"),
        ("Tempered", "class", {}, "Tempered missing a required argument: 'temperature'; its arguments: temperature"),
        ("of_each", "class", {"gamma": 2}, "got an unexpected keyword argument 'gamma'; its arguments: outputs"),
        ("torch.relu", "class", {}, "fails for outputs [3, 3] and targets [3] (TypeError: relu() takes 1 positional"),
        ("HERE", "class", {}, "is neither a function of (outputs, targets) nor a class of such functions"),
        ("nothing", "class", {}, "has no nothing"),
        ("torch.nn.MSELoss", "numbers", {"reduction": "mean"}, "loss.kwargs={'reduction': 'mean'}: a mean over"),
        ("torch.nn.CrossEntropyLoss", "class", {"weight": [1, 2]}, "weight tensor should be defined either for all 3"),
        ("torch.nn.CrossEntropyLoss", "mask", {}, "have the value 255: loss.kwargs={ignore_index: 255}"),
    ],
)
def test_a_loss_that_can_not_be_used_is_refused_in_one_line(
    path: str, kind: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        make(path, kind, **kwargs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "allowed", "is_refused"),
    [
        ("torch.nn.MultiMarginLoss", [], False),
        ("torch.nn.functional.mse_loss", [], False),
        ("torch.nn.functional.warnings", [], True),
        ("torch.nn.modules.loss.MSELoss", [], True),
        (f"{HERE}.mean", [], True),
        (f"{HERE}.mean", [HERE], False),
        # Imported from elsewhere by an allowed module.
        (f"{HERE}.types", [HERE], True),
        (f"{HERE}.build", [HERE], True),
    ],
)
def test_a_run_folder_may_name_torchs_losses_and_those_that_are_allowed(
    path: str, allowed: list[str], is_refused: bool
) -> None:
    assert types is not None
    if not is_refused:
        custom_loss.check_allowed(path, allowed)
        return
    with pytest.raises(ConfigError, match=r"^loss\._target_=.* is not below "):
        custom_loss.check_allowed(path, allowed)
