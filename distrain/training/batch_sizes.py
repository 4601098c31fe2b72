"""Whether the model can run the smallest groups of images that a run will give it, known from the sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.config.schema import Config
from distrain.data.base import Splits
from distrain.errors import ConfigError
from distrain.models.trial import ModelTrial
from distrain.strategies.base import Strategy

#: How many times larger than the configured one a batch size may be that is suggested.
_LARGEST_FACTOR = 4


@dataclass(frozen=True)
class _Split:
    """A split, and how its batches are divided.

    Attributes:
        config: The run's configuration.
        world_size: Number of ranks.
        strategy: Divides the batches.
        count: How many of its images are run.
        training: Whether they are trained on.
    """

    config: Config
    world_size: int
    strategy: type[Strategy]
    count: int
    training: bool

    def divided(self, batch_size: int) -> list[list[list[int]]]:
        """What :meth:`Strategy.forward_sizes` says of each size that a batch has: the full one and the last one."""
        totals = {min(batch_size, self.count), self.count % batch_size} - {0}
        return [
            self.strategy.forward_sizes(self.config, self.world_size, total, training=self.training)
            for total in sorted(totals)
        ]

    def leaves_one(self, batch_size: int) -> bool:
        """Whether some forward pass has a single image."""
        return any(1 in sizes for ranks in self.divided(batch_size) for sizes in ranks)

    def leaves_one_of_all(self, batch_size: int) -> bool:
        """Whether at some time a single image is run on all ranks together."""
        return any(1 in map(sum, zip(*ranks, strict=True)) for ranks in self.divided(batch_size))

    def better(self, batch_size: int) -> int | None:
        """The next larger batch size that leaves no image alone, or else the next smaller one; ``None``: there is none.

        Every rank should have samples, so none is smaller than the number of ranks.
        """
        largest = min(_LARGEST_FACTOR * batch_size, max(self.count, batch_size + 1))
        sizes = [*range(batch_size + 1, largest + 1), *range(batch_size - 1, self.world_size, -1)]
        return next((size for size in sizes if not self.leaves_one(size)), None)


def leaves_one(config: Config, world_size: int, strategy: type[Strategy], count: int) -> bool:
    """Whether BatchNorm takes statistics of a single image somewhere in a training.

    Args:
        config: The run's configuration.
        world_size: Number of ranks.
        strategy: Divides the batches.
        count: Training images.
    """
    split = _Split(config, world_size, strategy, _trained(config, count), training=True)
    together = strategy.normalises_together(config, world_size)
    return split.leaves_one_of_all(config.data.batch_size) if together else split.leaves_one(config.data.batch_size)


def _trained(config: Config, count: int) -> int:
    """How many of so many training images are trained on: a short run may end before the last batch of an epoch."""
    steps = config.trainer.max_steps
    return count if steps is None else min(count, steps * config.data.batch_size)


def check(config: Config, world_size: int, strategy: type[Strategy], splits: Splits, trial: ModelTrial) -> None:
    """Refuses sizes that leave an image alone if the model can't run a single image.

    An image may be alone in the last batch, in a rank's share of a batch, or in a piece or microbatch of a share.

    Args:
        config: The run's configuration.
        world_size: Number of ranks.
        strategy: Divides the batches.
        splits: The data.
        trial: Runs the model.

    Raises:
        ConfigError: The message says which size to type.
    """
    data, trained = config.data, _trained(config, len(splits.train))
    for name, count in (("train", trained), ("validate", len(splits.val)), ("test", len(splits.test))):
        training = name == "train"
        split = _Split(config, world_size, strategy, count, training)
        key, size = ("data.batch_size", data.batch_size) if training else ("data.eval_batch_size", data.eval_batch_size)
        if not count or not split.leaves_one(size):
            continue
        alone = not strategy.normalises_together(config, world_size) or split.leaves_one_of_all(size)
        problem = trial.problem_with(1, training=training, batchnorm=alone)
        if problem:
            better = split.better(size)
            way_out = f"{key}={better} leaves none alone" if better else _other_ways(config)
            raise ConfigError(key, size, f"{_where(split, name)}, and the model {problem}; {way_out}")


def _where(split: _Split, purpose: str) -> str:
    ranks = f" on {split.world_size} ranks" if split.world_size > 1 else ""
    return f"of {split.count} images to {purpose} on, a single one is left for a forward pass{ranks}"


def _other_ways(config: Config) -> str:
    ways = ["another number of images"]
    if config.trainer.largest_pass is not None:
        ways.append(f"another trainer.micro_batch_size than {config.trainer.largest_pass}")
    if hasattr(config.strategy, "microbatches"):
        ways.append(f"another strategy.microbatches than {config.strategy.microbatches}")
    return f"no other size is better; try {' or '.join(ways)}, or a model that runs one image (without BatchNorm)"
