"""The short way to compose a configuration for a test finds what Hydra finds."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from distrain.cli import hydra_entry
from tests import composing
from tests.runs import SMALL


def outcome(compose: Any, *arguments: Any) -> tuple[Any, ...]:
    try:
        config: DictConfig = compose(*arguments)
    except Exception as error:
        return type(error), str(error), type(error.__cause__)
    return OmegaConf.to_yaml(config), OmegaConf.is_struct(config)


@pytest.mark.parametrize(
    "arguments",
    [
        SMALL,
        (*SMALL, "strategy=fsdp", "strategy.shard=full", "strategy=ddp", "trainer.epochs=3", "trainer.epochs=4"),
        ("experiment=cifar10_fast", "model=custom", "+model.kwargs.norm=batch", "model.kwargs.more=[1,{a: b}]"),
        ("task=multilabel", "loss.name=focal", "compression=auto", "compression.candidates.topk.density=0.5"),
        ("logger=[csv,tensorboard]", "~scheduler", "run_dir=~/runs/a=b", "resume='a b'", "freeze=[{match: x}]"),
        ("model={name: custom}", "data.mean=[1,2]", "hydra.verbose=true"),
        ("trainer.epoch=3",),
        ("strategy=dpp", "trainer.epoch=3"),
        ("trainer.epochs=1,2",),
        ("trainer.epochs=(",),
        ("nothing=3", "+nothing=3"),
    ],
    ids=lambda arguments: arguments[-1],
)
def test_it_is_what_hydra_composes(arguments: tuple[str, ...]) -> None:
    expected = outcome(hydra_entry.compose, composing.CONF, "config", arguments)
    assert outcome(composing.compose, arguments) == expected


def test_a_composed_configuration_may_be_changed() -> None:
    composing.compose(SMALL).trainer.epochs = 77
    assert composing.compose(SMALL).trainer.epochs != 77
