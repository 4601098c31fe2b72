"""optimizer=custom: what breaks a promise is found on small parameters, before ranks meet, and refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distrain.config.groups import GroupConfig, OptimizerConfig
from distrain.errors import ConfigError
from distrain.optim.optimizers import trial
from distrain.optim.optimizers.adam import AdamConfig
from distrain.optim.optimizers.build import build_optimizer
from distrain.optim.optimizers.custom import CustomOptimizerConfig

HERE = __name__


class Plain(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def pairs(self) -> list[tuple[dict[str, Any], nn.Parameter]]:
        return [(group, parameter) for group in self.param_groups for parameter in group["params"]]


class Normed(Plain):
    """Divides by the norm of all gradients together."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        norm = torch.stack([p.grad.square().sum() for _, p in self.pairs() if p.grad is not None]).sum().sqrt()
        for group, parameter in self.pairs():
            assert parameter.grad is not None
            parameter.add_(parameter.grad / norm, alpha=-group["lr"])


class Hidden(Plain):
    """Counts its steps where nobody looks."""

    count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group, parameter in self.pairs():
            assert parameter.grad is not None
            parameter.add_(parameter.grad / self.count, alpha=-group["lr"])


class Grouped(Plain):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1


class Listing(Plain):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for _, parameter in self.pairs():
            self.state[parameter]["history"] = [1, 2]


class Closing(Plain):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class Rateless(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {})


def decayed(params: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 4))


def configured(path: str, weight_decay: float = 0.0, groups: tuple[GroupConfig, ...] = (), **kwargs: Any) -> Any:
    full = path if "." in path else f"{HERE}.{path}"
    return CustomOptimizerConfig(
        name="custom", lr=0.01, weight_decay=weight_decay, fused=True, groups=list(groups), _target_=full, kwargs=kwargs
    )


def check(config: OptimizerConfig, *, divided: bool = True) -> None:
    trial.check(config, model(), divided=divided)


@pytest.mark.parametrize(
    "name",
    ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"],
)
def test_torchs_optimizers_keep_the_promises(name: str) -> None:
    whole = model()
    state = torch.random.get_rng_state()
    trial.check(configured(f"torch.optim.{name}"), whole, divided=True)
    assert torch.random.get_rng_state().equal(state)


def test_arguments_reach_the_optimizer_and_its_groups() -> None:
    group = GroupConfig(match="3.*", kwargs={"betas": [0.5, 0.6]})
    config = configured("torch.optim.RAdam", 0.1, (group,), betas=[0.8, 0.9], decoupled_weight_decay=True)
    check(config)
    first, second = build_optimizer(config, model().named_parameters()).param_groups
    assert (first["lr"], first["weight_decay"], first["decoupled_weight_decay"]) == (0.01, 0.1, True)
    assert (list(first["betas"]), list(second["betas"])) == ([0.8, 0.9], [0.5, 0.6])


def test_an_optimizer_that_does_not_follow_the_rate_can_not_freeze_a_group() -> None:
    group = GroupConfig(match="3.*", epochs=1)
    check(configured("torch.optim.RAdam", 0.1, (group,)))
    with pytest.raises(ConfigError, match=r"^optimizer\.groups\[0\]\.epochs=1: torch\.optim\.Rprop changes parameters"):
        check(configured("torch.optim.Rprop", groups=(group,)))


def test_a_function_may_make_the_optimizer() -> None:
    check(configured("decayed", 0.2))
    built = build_optimizer(configured("decayed", 0.2), model().named_parameters())
    assert built.param_groups[0]["weight_decay"] == 0.2


def test_an_update_that_mixes_parameters_is_refused_only_where_they_are_divided() -> None:
    check(configured("Normed"), divided=False)
    with pytest.raises(ConfigError, match="depends on other parameters, and this strategy divides them"):
        check(configured("Normed"))


@pytest.mark.parametrize(
    ("path", "keys", "message"),
    [
        ("torch.optim.LBFGS", {}, "its step calls a closure that computes the loss again"),
        ("Closing", {}, "its step calls a closure that computes the loss again"),
        ("torch.optim.SparseAdam", {}, "its step fails (RuntimeError: SparseAdam does not support dense gradients"),
        ("torch.optim.Adafactor", {}, "keeps row_var, [3, 3, 3, 1] for a parameter [3, 3, 3, 3]"),
        ("torch.optim.Nope", {}, "module torch.optim has no Nope"),
        ("torch.nn.Linear", {}, "is neither a torch.optim.Optimizer nor a function that makes one"),
        ("builtins.max", {}, "fails to build (TypeError: 'lr' is an invalid keyword argument for max())"),
        ("torch.optim.Rprop", {"weight_decay": 0.1}, "optimizer.weight_decay=0.1: torch.optim.Rprop takes none"),
        ("torch.optim.RAdam", {"betaz": 1}, "optimizer.kwargs={'betaz': 1}: torch.optim.RAdam got an unexpected"),
        ("torch.optim.RAdam", {"betas": [2, 3]}, "fails to build (ValueError: Invalid beta parameter"),
        ("Hidden", {}, "doesn't go on exactly from its state of the parameters: it keeps more elsewhere"),
        ("Grouped", {}, "keeps count for all parameters together, which no checkpoint holds"),
        ("Listing", {}, "keeps history, a list; a checkpoint holds tensors and numbers alone"),
        ("Rateless", {}, "has no learning rate `lr` in its parameter groups"),
        ("model", {}, "model too many positional arguments"),
    ],
)
def test_an_optimizer_that_can_not_be_used_is_refused_in_one_line(
    path: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check(configured(path, **keys))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "key"), [("lr", "lr"), ("weight_decay", "weight_decay"), ("fused", "fused")])
def test_arguments_with_a_key_of_their_own_are_refused(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^optimizer\.kwargs\.{name}=1: is set by optimizer\.{key}"):
        CustomOptimizerConfig(name="custom", lr=1, weight_decay=0, fused=True, _target_="a.b", kwargs={name: 1})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beta": [0.9, 0.9]}, r"optimizer\.groups\[0\]\.kwargs\.beta=\[0\.9, 0\.9\]: optimizer=adam has no such"),
        ({"lr": 1.0}, r"optimizer\.groups\[0\]\.kwargs\.lr=1\.0: is set by optimizer\.groups\[0\]\.lr_factor"),
    ],
)
def test_options_of_a_group_that_no_optimizer_has_are_refused(kwargs: dict[str, Any], message: str) -> None:
    group = GroupConfig(match="0.*", kwargs=kwargs)
    config = AdamConfig(name="adam", lr=0.1, weight_decay=0, fused=True, groups=[group], betas=[0.9, 0.99], eps=1e-8)
    with pytest.raises(ConfigError, match=message):
        check(config)
