"""What a run says of itself at its end."""

from __future__ import annotations

from distrain.training.report import hyperparameters
from tests.runs import small

MAIN = {
    "data.name", "data.batch_size", "model.name", "strategy.name", "compression.name", "optimizer.name",
    "optimizer.lr", "loss.name", "scheduler.name", "trainer.epochs", "seed",
}  # fmt: skip


def test_hyperparameters_are_the_main_ones_and_those_that_were_typed() -> None:
    config = small(
        "strategy=ddp", "optimizer=sgd", "optimizer.lr=0.2", "optimizer.momentum=0.8", "data.augment.flip=true"
    )
    command = ["launch/train.py", "strategy=ddp", "optimizer.lr=0.2", "--multirun", "run_dir=x"]
    shown = hyperparameters(config, command)
    assert shown.keys() == MAIN
    assert (shown["strategy.name"], shown["optimizer.lr"]) == ("ddp", 0.2)
    more = hyperparameters(config, [*command, "+optimizer.momentum=0.8", "data.augment={flip: true}"])
    augmentation = {key for key in more if key.startswith("data.augment.")}
    assert "data.augment.flip" in augmentation
    assert more.keys() == MAIN | {"optimizer.momentum"} | augmentation
