"""Who types a key that does not exist is told which one was probably meant."""

from __future__ import annotations

import pytest

from distrain.config.key_search import schema_docs, similar_keys
from distrain.config.schema import Config


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", ["optimizer.lr"]),
        ("LR", ["optimizer.lr"]),
        ("trainer.lr", ["optimizer.lr"]),
        ("learning_rate", ["optimizer.lr"]),
        ("epochs", ["trainer.epochs"]),
        ("num_epochs", ["trainer.epochs"]),
        ("max_epochs", ["trainer.epochs"]),
        ("batch_size", ["data.batch_size"]),
        ("batchsize", ["data.batch_size"]),
        ("global_batch_size", ["data.batch_size"]),
        ("max_steps", ["trainer.max_steps"]),
        ("weightdecay", ["optimizer.weight_decay"]),
        ("device", ["runtime.device"]),
        ("precision", ["trainer.precision"]),
        ("every_steps", ["checkpoint.every_steps"]),
        ("zebra", []),
        ("", []),
    ],
)
def test_key_that_was_meant_is_found(typed: str, meant: list[str]) -> None:
    found = similar_keys(typed, schema_docs(Config))
    assert found[:1] == meant


def test_several_keys_of_the_same_name_are_all_found() -> None:
    assert similar_keys("name", {"a.name": "", "b.c.name": "", "named": ""}) == ["a.name", "b.c.name"]
