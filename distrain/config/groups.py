"""Keys that every choice of a group has, such as ``optimizer.lr``: one base class a group.

A choice adds its own keys in a subclass, beside its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distrain.config.augment import AugmentConfig
from distrain.config.setting import setting


@dataclass
class StrategyConfig:
    """How the work is divided among ranks. The keys of each strategy are defined in ``distrain/strategies``."""

    name: str = setting("Name of the strategy.")

    def keys_for_less_memory(self, world_size: int) -> str:
        """What to type so that a rank keeps less of parameters, gradients and optimizer state; empty: nothing helps.

        Args:
            world_size: Number of ranks.
        """
        return "strategy=fsdp strategy.shard=full"


@dataclass
class CompressionConfig:
    """How gradients are compressed. The keys of each compressor are defined in ``distrain/compression``."""

    name: str = setting("Name of the compressor.")


@dataclass
class ModelConfig:
    """The model to train. The keys of each model are defined in ``distrain/models``."""

    name: str = setting("Name of the model; custom: any importable class, named by _target_.")
    _target_: str = setting("Dotted path of the nn.Module class to build.")
    checkpoint_activations: int | str = setting(
        "Blocks whose activations are not kept for the backward pass but computed again in it: less memory, longer "
        "steps, the same training. none; all; a number N: every N-th block; auto: as few as runtime.memory_limit_mb "
        "allows, chosen by the measured size and time of each block.",
        words=("none", "all", "auto"),
        at_least=1,
        default="none",
        affects=("execution",),
    )


@dataclass
class DataConfig:
    """The data set. The keys of each data set are defined in ``distrain/data``."""

    name: str = setting("Name of the data set.")
    root: str | None = setting("Folder that contains the data; null if the data set needs none.", path=True)
    batch_size: int = setting(
        "Global batch size: samples per training step over all ranks.", at_least=1, affects=("schedule",)
    )
    eval_batch_size: int = setting("Samples per evaluation step over all ranks.", at_least=1)
    val_fraction: float = setting("Share of the training samples held out for validation.", at_least=0, below=1)
    split_seed: int = setting(
        "Selects the held-out samples; independent of the run's seed, so that runs are comparable.", at_least=0
    )
    limit: int | None = setting(
        "Use only this many training samples; null: all.", at_least=1, affects=("sample_order", "schedule")
    )
    mean: list[float] | None = setting(
        "Channel means in [0, 1], used to normalise; null: measured on the training images."
    )
    std: list[float] | None = setting(
        "Channel standard deviations in [0, 1]; null: measured on the training images.", above=0
    )
    augment: AugmentConfig = setting("Augmentation of training images.", default_factory=AugmentConfig)
    eval_crop: float = setting(
        "Share of each side of an image that evaluation sees, in its centre, such as 0.875. Training without "
        "augment.random_resized_crop sees the same.",
        above=0,
        at_most=1,
        default=1.0,
    )
    memory_limit_mb: int = setting(
        "Data that needs more memory than this, in MiB, is read from disk during training.", at_least=0
    )
    prefetch: int | None = setting(
        "Batches prepared in the background; null: 0 if on CPU with the data in memory, else 2.", at_least=0
    )
    balance: str = setting(
        "Classes of unequal size count equally. sampler: an epoch has equally many samples of each class; loss: the "
        "loss of a sample is weighted inversely to the size of its class.",
        choices=("none", "sampler", "loss"),
        default="none",
        affects=("sample_order",),
    )
    fold: str | None = setting(
        "Cross-validation, K/N: the validation samples are part K (from 1) of N equal parts of the training samples; "
        "takes the place of val_fraction. null: none.",
        default=None,
        affects=("schedule",),
    )


@dataclass
class TaskConfig:
    """What the model is trained to do. The keys of each task are defined in ``distrain/tasks``."""

    name: str = setting("Name of the task.")


@dataclass
class LossConfig:
    """The loss to minimise: the mean over samples, computed as a global sum divided by a global count."""

    name: str = setting("Name of the loss.")


@dataclass
class GroupConfig:
    """Parameters with other optimizer settings than the rest."""

    match: str = setting(
        "Shell pattern of the parameters' names, such as *.bias; head: those of the model's last layer. A parameter "
        "belongs to the first group that matches."
    )
    lr_factor: float = setting("Their learning rate is multiplied by this.", above=0, default=1.0)
    weight_decay: float | None = setting(
        "Their weight decay; null: the same as for other parameters.", at_least=0, default=None
    )
    epochs: float | None = setting(
        "Train them in this many first epochs only; null: in all epochs.", above=0, default=None
    )
    kwargs: dict[str, Any] = setting(
        "Their own values of other options of the optimizer, such as {betas: [0.9, 0.99]}.", default_factory=dict
    )


@dataclass
class LookaheadConfig:
    """Lookahead: regularly merges the parameters into a slow copy and sets them to that copy."""

    every: int | None = setting(
        "Updates between merges of the parameters into a slow copy; null: no lookahead.", at_least=1
    )
    keep: float = setting(
        "Weight of the slow copy in a merge; 1 - keep is the weight of the parameters.", at_least=0, below=1
    )
    power: float = setting("keep is multiplied by (completed share of the run) ** power; 0: constant.", at_least=0)


@dataclass
class OptimizerConfig:
    """The optimizer. The keys of each optimizer are defined in ``distrain/optim/optimizers``."""

    name: str = setting("Name of the optimizer.")
    lr: float = setting("Base learning rate; the schedule multiplies it by a factor.", above=0, affects=("schedule",))
    weight_decay: float = setting("Weight decay; the optimizer determines how it is applied.", at_least=0)
    fused: bool = setting("Use torch's fused kernel if there is one for the device.")
    groups: list[GroupConfig] = setting("Other settings for some parameters, by name.", default_factory=list)
    layer_decay: float | None = setting(
        "Factor from each layer's rate to that of the layer before it, so the first layers change least; the last one "
        "has the whole rate. null: all layers have.",
        above=0,
        at_most=1,
        default=None,
    )
    no_decay: list[str] = setting(
        "Parameters without weight decay, besides those of groups with their own. norm: those with at most one "
        "dimension that are not biases, as the weights of norm layers; bias: those that are called bias, of norm "
        "layers too.",
        choices=("norm", "bias"),
        default_factory=list,
    )
    sam_rho: float | None = setting(
        "Sharpness-aware minimization: each step takes its gradient at parameters that are so far away, in the "
        "direction in which the loss rises most. It needs two passes. null: no such step.",
        above=0,
        default=None,
    )
    lookahead: LookaheadConfig = setting(
        "Lookahead (Zhang et al. 2019, arXiv 1907.08610).",
        default_factory=lambda: LookaheadConfig(every=None, keep=0.5, power=0.0),
    )

    @property
    def has_modes(self) -> bool:
        """Whether parameters differ in evaluation and training; see :mod:`distrain.optim.optimizers.modes`."""
        return False


@dataclass
class SchedulerConfig:
    """The learning rate's schedule: a function of the step, so it has no state to save; plateau also reads scores."""

    name: str = setting("Name of the schedule.")
    warmup_epochs: float = setting(
        "First epochs in which the learning rate rises linearly from 0; fractions are allowed.", at_least=0
    )


@dataclass
class LoggerConfig:
    """Where metrics are logged, in addition to the terminal, ``metrics.jsonl`` and ``summary.json``."""

    name: str = setting("Name of the logger.")

    def check(self) -> None:
        """Refuses what rank 0 can't use, such as a logger whose package is not installed.

        Raises:
            ConfigError: One line that names the key and the way out.
        """
