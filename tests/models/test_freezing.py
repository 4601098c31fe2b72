"""Which parameters are trained in which epoch; what is refused; which modules keep still."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distrain.config.schema import FreezeConfig
from distrain.errors import ConfigError
from distrain.models.freezing import FreezeSchedule, still_modules, train_only
from distrain.runtime.world import World
from distrain.strategies.base import Strategy
from distrain.strategies.single import Single
from tests.runs import check, small


class Net(nn.Module):
    """A backbone of two blocks with every kind of BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        block = [nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False), nn.Dropout(0.5)]
        self.scale = nn.Parameter(torch.ones(()))
        self.stem = nn.Sequential(*block)
        self.body = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
        self.head = nn.Linear(2, 2)


def schedule(*entries: tuple[str, int | None]) -> FreezeSchedule:
    return FreezeSchedule([FreezeConfig(match, epochs) for match, epochs in entries], Net())


def test_parameters_are_trained_from_their_epoch_on() -> None:
    found = schedule(("head", 0), ("stem.*", None), ("body.0.*", 3), ("*", 1))
    assert found.epochs == [0, 1, 3]
    assert found.trained(0) == {"head.weight", "head.bias"}
    assert found.trained(2) == {"head.weight", "head.bias", "body.1.weight", "body.1.bias", "scale"}
    assert found.trained(3) == found.trained(99) == found.ever_trained
    assert found.parameters - found.ever_trained == {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"}


def test_parameters_that_the_model_does_not_train_stay_so() -> None:
    model = Net()
    model.stem.requires_grad_(False)
    found = FreezeSchedule([FreezeConfig("body.*", 1)], model)
    train_only(model, found.trained(1), found.parameters)
    assert not any(parameter.requires_grad for parameter in model.stem.parameters())
    with pytest.raises(ConfigError, match="matches none of the parameters that would"):
        FreezeSchedule([FreezeConfig("stem.*", 1)], model)


def test_modules_keep_still_whose_own_parameters_are_frozen() -> None:
    model = Net()
    frozen = {name for name, _ in model.named_parameters() if not name.startswith(("body.0", "head"))}
    assert still_modules(model, frozen) == ["stem.0", "stem.1", "stem.2", "body.1"]
    # A normalisation without parameters is part of what is around it.
    assert still_modules(model, frozen - {"stem.0.weight"}) == ["stem.1", "body.1"]
    assert still_modules(model, set()) == []


def test_a_strategy_of_the_users_that_can_not_freeze_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Single, "set_trained", Strategy.set_trained)
    with pytest.raises(ConfigError, match=r"^freeze: strategy=single can't freeze parameters"):
        check(small("freeze=[{match: block1.*}]"), World.from_environment())
    with pytest.raises(ConfigError, match=r"^lora: strategy=single can't freeze parameters"):
        check(small("lora.rank=2"), World.from_environment())


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["freeze=[{match: blok1.*}]"], r"freeze\[0\].match=blok1.*: matches none .*mean block1"),
        (["freeze=[{match: '*', epochs: 1}, {match: head}]"], r"freeze\[1\].match=head: matches none"),
        (["freeze=[{match: '*', epochs: 2}]"], "freeze: leaves no parameter to train in the first 2 epochs; an entry"),
        (["freeze=[{match: '*'}]"], "freeze: leaves no parameter to train; an entry before"),
        (["freeze=[{match: head, epochs: -1}]"], r"freeze\[0\].epochs=-1: must be at least 0"),
        (["freeze=[{match: head, epochs: 1.5}]"], r"freeze\[0\].epochs=1.5: must be a whole number, or null"),
        (["freeze=[{match: head}, {mtch: a}]"], r"freeze\[1\].mtch: no such key; .*did you mean match"),
        (["freeze=[head]"], "freeze=.*must be a list, each element a mapping"),
        (
            ["freeze=[{match: block1.*, epochs: 1}]", "optimizer.lookahead.every=5"],
            "optimizer.lookahead.every=5: counts updates",
        ),
        (
            ["freeze=[{match: block1.*, epochs: 1}]", "optimizer.groups=[{match: '*.bias', epochs: 1}]"],
            r"optimizer.groups\[0\].epochs=1.0: counts updates",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as refused:
        check(small(*overrides), World.from_environment())
    assert "\n" not in str(refused.value)


def test_frozen_for_ever_goes_together_with_counts_of_updates() -> None:
    check(small("freeze=[{match: block1.*}]", "optimizer.lookahead.every=5"), World.from_environment())
