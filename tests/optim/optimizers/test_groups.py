"""Parameter groups have their own learning-rate factor, weight decay and number of epochs, but one common rate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distrain.errors import ConfigError
from distrain.models.layers import layer_depths
from distrain.optim.optimizers import updates
from distrain.optim.optimizers.build import build_optimizer
from distrain.optim.optimizers.groups import describe_rates
from distrain.runtime.world import World
from tests.runs import check, small

GRADIENT = torch.tensor([0.5, -1.0])


def step(optimizer: torch.optim.Optimizer, *parameters: nn.Parameter) -> None:
    for parameter in parameters:
        parameter.grad = GRADIENT.clone()
    optimizer.step()


def make_optimizer(*overrides: str) -> tuple[torch.optim.Optimizer, nn.Parameter, nn.Parameter]:
    """An optimizer of a parameter ``first.weight`` and a parameter ``last.bias``, both of ones."""
    weight, bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    config = small("optimizer.lr=0.1", *overrides).optimizer
    named = [("first.weight", weight), ("last.bias", bias)]
    return build_optimizer(config, named, steps_per_epoch=4, total_steps=8), weight, bias


def after_sgd_step(rate: float, decay: float = 0.0, start: Tensor | None = None) -> Tensor:
    start = torch.ones(2) if start is None else start
    return start - rate * (GRADIENT + decay * start)


def test_a_group_has_its_own_rate_and_decay() -> None:
    optimizer, weight, bias = make_optimizer(
        "optimizer=sgd",
        "optimizer.weight_decay=0.3",
        "optimizer.groups=[{match: '*.bias', lr_factor: 5, weight_decay: 0}]",
    )
    step(optimizer, weight, bias)
    torch.testing.assert_close(weight.detach(), after_sgd_step(0.1, decay=0.3))
    torch.testing.assert_close(bias.detach(), after_sgd_step(0.5))


def test_the_first_matching_group_applies_with_the_default_decay() -> None:
    groups = "[{match: last.*, lr_factor: 2}, {match: '*.bias', lr_factor: 3}]"
    optimizer, weight, bias = make_optimizer(
        "optimizer=sgd", "optimizer.weight_decay=0.3", f"optimizer.groups={groups}"
    )
    step(optimizer, weight, bias)
    torch.testing.assert_close(bias.detach(), after_sgd_step(0.2, decay=0.3))


NAMES = ("norm.weight", "norm.bias", "head.weight", "head.bias")


@pytest.mark.parametrize(
    ("keys", "without"),
    [
        ("optimizer.no_decay=[norm]", {"norm.weight"}),
        ("optimizer.no_decay=[bias]", {"norm.bias", "head.bias"}),
        ("optimizer.no_decay=[norm,bias]", {"norm.weight", "norm.bias", "head.bias"}),
        (
            "optimizer.no_decay=[norm,bias] optimizer.groups=[{match:'head.*',lr_factor:2,weight_decay:0.3}]",
            {"norm.weight", "norm.bias"},
        ),
        ("optimizer.no_decay=[bias] optimizer.groups=[{match:'head.*',lr_factor:2}]", {"norm.bias", "head.bias"}),
        ("optimizer.no_decay=[bias] optimizer.layer_decay=0.5", {"norm.bias", "head.bias"}),
    ],
)
def test_norms_and_biases_can_have_no_weight_decay(keys: str, without: set[str]) -> None:
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(3), "head": nn.Linear(3, 2)})
    config = small("optimizer=sgd", "optimizer.weight_decay=0.3", *keys.split()).optimizer
    optimizer = build_optimizer(config, model.named_parameters(), depths=layer_depths(model))
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert decays == {name: 0.0 if name in without else 0.3 for name in NAMES}
    assert str(describe_rates(config, model)).count(" 0  ") >= 1
    # Who sets the rate needs to know nothing of groups, so there is a first one, even if it is empty.
    assert optimizer.param_groups[0].get("lr_factor", 1.0) == 1.0


CHOICES = ["sgd", "adam", "adamw", "muon", "lamb", "lars", "lion", "schedule_free_adamw"]


@pytest.mark.parametrize("choice", CHOICES)
def test_all_groups_have_one_rate_between_steps(choice: str) -> None:
    optimizer, weight, bias = make_optimizer(f"optimizer={choice}", "optimizer.groups=[{match: '*', lr_factor: 5}]")
    for group in optimizer.param_groups:
        group["lr"] = 0.2
    step(optimizer, weight, bias)
    assert {group["lr"] for group in optimizer.param_groups} == {0.2}


@pytest.mark.parametrize("choice", ["sgd optimizer.momentum=0.9 optimizer.nesterov=true", "adamw", "muon"])
def test_a_group_is_frozen_after_its_epochs(choice: str) -> None:
    groups = "optimizer.groups=[{match: '*.bias', epochs: 0.5}]"
    optimizer, weight, bias = make_optimizer(*f"optimizer={choice} optimizer.weight_decay=0.1".split(), groups)
    values = []
    for _ in range(4):
        step(optimizer, weight, bias)
        values.append((weight.detach().clone(), bias.detach().clone()))
    assert updates.completed(optimizer) == 4
    assert not values[0][1].equal(values[1][1])
    assert values[1][1].equal(values[3][1])
    assert not values[1][0].equal(values[2][0])


def test_updates_are_not_counted_without_groups() -> None:
    optimizer, weight, bias = make_optimizer("optimizer=sgd")
    step(optimizer, weight, bias)
    assert updates.completed(optimizer) == 0


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("[{match: '*.bais'}]", "optimizer.groups[0].match=*.bais: matches no parameter of the model"),
        ("[{match: '*'}, {match: output.bias}]", "optimizer.groups[1].match=output.bias: matches no parameter"),
        ("[{match: '*', lr_factor: 0}]", "optimizer.groups[0].lr_factor=0.0: must be greater than 0"),
        ("[{lr_factor: 2}]", "optimizer.groups[0].match: needs a value"),
    ],
)
def test_invalid_groups_are_refused_before_any_process_group_forms(groups: str, message: str) -> None:
    world = World(rank=0, size=1, local_rank=0, local_size=1, host="here")
    with pytest.raises(ConfigError) as caught:
        check(small("optimizer=sgd", f"optimizer.groups={groups}"), world)
    assert message in str(caught.value)


# --- learning rates by layer -----------------------------------------------------------------------------------------


def three_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("choice", ["sgd", "adam", "muon"])
def test_each_layer_has_a_part_of_the_rate_of_the_next_one(choice: str) -> None:
    model = three_layers()
    config = small(
        f"optimizer={choice}",
        "optimizer.lr=0.1",
        "optimizer.layer_decay=0.5",
        "optimizer.groups=[{match: '*.bias', lr_factor: 8, weight_decay: 0}]",
    ).optimizer
    optimizer = build_optimizer(config, model.named_parameters(), depths=layer_depths(model))
    names = {parameter: name for name, parameter in model.named_parameters()}
    factors = {names[p]: group["lr_factor"] for group in optimizer.param_groups for p in group["params"]}
    rates = {"0.weight": 0.25, "1.weight": 0.5, "2.weight": 1, "0.bias": 2, "1.bias": 4, "2.bias": 8}
    assert factors == pytest.approx(rates)


def test_the_rate_of_a_layer_scales_its_update() -> None:
    model, same = three_layers(), three_layers()
    options = ("optimizer=sgd", "optimizer.momentum=0", "optimizer.lr=0.1")
    decayed = build_optimizer(
        small(*options, "optimizer.layer_decay=0.5").optimizer, model.named_parameters(), depths=layer_depths(model)
    )
    plain = build_optimizer(small(*options).optimizer, same.named_parameters())
    for optimizer in (decayed, plain):
        step(optimizer, *(p for group in optimizer.param_groups for p in group["params"] if p.dim() == 1))
    start, plainly = dict(three_layers().named_parameters()), dict(same.named_parameters())
    moved = dict(model.named_parameters())
    for name, factor in (("0.bias", 0.25), ("1.bias", 0.5), ("2.bias", 1.0)):
        torch.testing.assert_close(moved[name] - start[name], factor * (plainly[name] - start[name]))


def test_the_head_can_be_a_group() -> None:
    model = three_layers()
    config = small("optimizer.groups=[{match: head, lr_factor: 10}]").optimizer
    optimizer = build_optimizer(config, model.named_parameters(), depths=layer_depths(model))
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]


def test_the_log_shows_each_layers_rate() -> None:
    config = small("optimizer=adamw", "optimizer.layer_decay=0.5", "optimizer.weight_decay=0.1").optimizer
    _, *rows = describe_rates(config, three_layers()).splitlines()
    assert [row.split() for row in rows] == [
        [str(depth), factor, "×", "lr", "0.1", "6", f"{depth}.weight", "…", f"{depth}.bias"]
        for depth, factor in enumerate(("0.25", "0.5", "1"))
    ]


@pytest.mark.parametrize("value", ["0", "1.1", "-1", "nan", "x"])
def test_a_layer_decay_outside_its_limits_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.layer_decay="):
        small(f"optimizer.layer_decay={value}")
