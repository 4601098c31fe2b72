"""The keys of strategy=local_sgd."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.config.groups import StrategyConfig
from distrain.config.setting import setting
from distrain.errors import ConfigError


@dataclass
class LocalSGDConfig(StrategyConfig):
    """Keys of ``strategy=local_sgd``."""

    sync_every: int = setting("Steps that a rank takes by itself between merges.", at_least=1)
    outer_optimizer: str = setting(
        "How a merge updates the shared parameters: average replaces them by the mean of all copies; sgd and nesterov "
        "take the difference from that mean as a gradient.",
        choices=("average", "sgd", "nesterov"),
    )
    outer_lr: float = setting("Learning rate of the outer optimizer sgd or nesterov.", above=0)
    outer_momentum: float = setting("Momentum of the outer optimizer sgd or nesterov.", at_least=0, below=1)
    average_optimizer_state: bool = setting("Average the optimizer's moments at merges too, uncompressed.")
    warmup_steps: int = setting("Number of first steps in which gradients are summed, as ddp does.", at_least=0)
    group_size: int | None = setting(
        "Ranks are divided into groups of this size, which merge every sync_every steps; null: no groups.", at_least=2
    )
    global_every: int = setting("With groups: all ranks merge every global_every * sync_every steps.", at_least=1)
    fragments: int = setting("Number of parts of the model, which are merged in turn.", at_least=1)
    overlap_steps: int = setting("Steps taken while a merge is under way; 0 waits for it.", at_least=0)
    mixing: float = setting(
        "With overlap_steps: share of its own parameters that a rank keeps when it applies a merge.",
        at_least=0,
        below=1,
    )

    @property
    def period(self) -> int:
        """Steps between a fragment's merges among all ranks."""
        return self.sync_every * self.global_every

    def __post_init__(self) -> None:
        """Refuses values that contradict each other.

        Raises:
            ConfigError: The message names the key.
        """
        if self.outer_optimizer == "nesterov" and not self.outer_momentum:
            raise ConfigError("strategy.outer_momentum", self.outer_momentum, "outer_optimizer=nesterov needs some")
        if (self.group_size is None) != (self.global_every == 1):
            problem = "needs strategy.group_size" if self.group_size is None else "with groups it must be above 1"
            raise ConfigError("strategy.global_every", self.global_every, problem)
        if self.fragments > self.period:
            problem = f"only {self.period} steps are available for their merges"
            raise ConfigError("strategy.fragments", self.fragments, problem)
        steps_apart = self.period // self.fragments
        if self.overlap_steps > steps_apart:
            problem = f"a merge must be over when the next one begins, {steps_apart} steps later"
            raise ConfigError("strategy.overlap_steps", self.overlap_steps, problem)
        if self.overlap_steps and self.average_optimizer_state:
            problem = "needs strategy.overlap_steps=0, since moments can't be applied late"
            raise ConfigError("strategy.average_optimizer_state", True, problem)
