"""The schema of a run's configuration: every key with its type, its limits and its meaning.

The YAML files below ``conf/`` hold the values, one file a choice; the dataclasses here hold the types and the limits.
:func:`distrain.config.load.load_config` turns what Hydra composed into these dataclasses, checked; everything behind it
works with typed Python, never with a ``DictConfig``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


def setting(
    doc: str,
    *,
    choices: Iterable[Any] = (),
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    each: str | None = None,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field with its meaning and its limits.

    Args:
        doc: What the key means, with its unit.
        choices: The only values allowed, where they can be listed.
        above: Exclusive lower limit (of each element, where the field is a list).
        at_least: Inclusive lower limit.
        below: Exclusive upper limit.
        at_most: Inclusive upper limit.
        each: The field is a mapping whose values are choices of this group, each checked by its own schema.
        default: Value where the YAML file gives none; normally the YAML files hold all values.
        default_factory: The same, made anew each time.
    """
    metadata = {
        "doc": doc,
        "choices": tuple(choices),
        "above": above,
        "at_least": at_least,
        "below": below,
        "at_most": at_most,
        "each": each,
    }
    if default_factory is not dataclasses.MISSING:
        return field(metadata=metadata, default_factory=default_factory)
    return field(metadata=metadata, default="???" if default is dataclasses.MISSING else default)


@dataclass
class StrategyConfig:
    """How the work is divided. Each strategy's own keys are in its file below ``distrain/strategies``."""

    name: str = setting("Which strategy.")


@dataclass
class CompressionConfig:
    """How gradients travel. Each compressor's own keys are in its file below ``distrain/compression``."""

    name: str = setting("Which compressor.")


@dataclass
class ModelConfig:
    """What is trained. Each model's own keys are in its file below ``distrain/models``."""

    name: str = setting("Which model; `custom` takes any importable one by `_target_`.")
    _target_: str = setting("Dotted path of the nn.Module to build.")


@dataclass
class AugmentConfig:
    """Whole-batch augmentation of training images; each sample's draw depends on (seed, epoch, sample index) alone."""

    flip: bool | str = setting(
        "Mirror left and right with probability 1/2; alternating: by chance in the first epoch, then in turns.",
        choices=(False, True, "alternating"),
    )
    crop_padding: int = setting("Pad each side by this many pixels and crop back at random; 0 for none.", at_least=0)
    crop_border: str = setting(
        "What the padding is: black, or the image mirrored at its edge.", choices=("zeros", "reflect"), default="zeros"
    )
    cutout: int = setting("Side in pixels of a square set to the mean at a random place; 0 for none.", at_least=0)


@dataclass
class DataConfig:
    """What is trained on. Each data set's own keys are in its file below ``distrain/data``."""

    name: str = setting("Which data set.")
    root: str | None = setting("Folder that holds the data; null where the data set needs none.")
    batch_size: int = setting("Global batch: samples a training step sees over all ranks.", at_least=1)
    eval_batch_size: int = setting("Samples an evaluation step sees over all ranks.", at_least=1)
    val_fraction: float = setting("Share of the training images kept for validation.", at_least=0, below=1)
    split_seed: int = setting("Fixes which images are kept; not the run's seed, so that runs compare.", at_least=0)
    limit: int | None = setting("Use only this many training images (null: all); for trying things out.", at_least=1)
    mean: list[float] | None = setting(
        "Channel means in [0, 1] for normalising; null: measured on the training images."
    )
    std: list[float] | None = setting("Channel standard deviations; null: measured.", above=0)
    augment: AugmentConfig = setting("Augmentation.", default_factory=AugmentConfig)
    memory_limit_mb: int = setting("Images that take more stream from the memory map, prefetched.", at_least=0)
    prefetch: int | None = setting(
        "Batches made ready in the background; null: 0 for CPU and images in memory, else 2.", at_least=0
    )


@dataclass
class TaskConfig:
    """What the model is trained to do. Each task's own keys are in its file below ``distrain/tasks``."""

    name: str = setting("Which task.")


@dataclass
class LossConfig:
    """What is minimised; always a mean over samples, computed as a global sum over a global count."""

    name: str = setting("Which loss.")


@dataclass
class GroupConfig:
    """Parameters that an optimizer treats in another way than the rest."""

    match: str = setting("Those whose name fits this shell pattern, as `*.bias`, and none of the groups before.")
    lr_factor: float = setting("Their rate is this times the others'.", above=0, default=1.0)
    weight_decay: float | None = setting("Their weight decay; null: the others'.", at_least=0, default=None)
    epochs: float | None = setting(
        "They are trained in so many first epochs only; null: in all.", above=0, default=None
    )


@dataclass
class LookaheadConfig:
    """Lookahead: a slow copy of the parameters that the optimizer's own are set back to now and then."""

    every: int | None = setting("Updates between merges into the slow copy; null: there is none.", at_least=1)
    keep: float = setting("Share of itself that the slow copy keeps in a merge.", at_least=0, below=1)
    power: float = setting("`keep` is times this power of the share of the run that is done; 0: constant.", at_least=0)


@dataclass
class OptimizerConfig:
    """How parameters are updated."""

    name: str = setting("Which optimizer.")
    lr: float = setting("Base learning rate; the scheduler multiplies it.", above=0)
    weight_decay: float = setting("Weight decay.", at_least=0)
    fused: bool = setting("Use torch's fused kernel where it has one for the device.")
    groups: list[GroupConfig] = setting("Parameters that are treated in another way, by name.", default_factory=list)
    lookahead: LookaheadConfig = setting(
        "Lookahead (Zhang et al. 2019, arXiv 1907.08610).",
        default_factory=lambda: LookaheadConfig(every=None, keep=0.5, power=0.0),
    )


@dataclass
class SchedulerConfig:
    """How the learning rate changes; a pure function of the step, so that it needs no state of its own."""

    name: str = setting("Which schedule.")
    warmup_epochs: float = setting("The rate rises linearly from 0 over this many epochs.", at_least=0)


@dataclass
class LoggerConfig:
    """Where metrics go besides the terminal, ``metrics.jsonl`` and ``summary.json``."""

    name: str = setting("Which logger.")


@dataclass
class TrainerConfig:
    """The loop."""

    epochs: int = setting("Passes over the training images.", at_least=1)
    max_steps: int | None = setting(
        "End the run after this many steps, with its evaluation, checkpoint and summary.", at_least=1
    )
    max_minutes: float | None = setting(
        "Save and end with exit code 75 after so long, to be gone on with later; null: no limit.", above=0
    )
    on_nonfinite: str = setting(
        "A gradient that is NaN or infinite: end the run; leave the update out; or go back to the newest checkpoint.",
        choices=("stop", "skip", "rewind"),
    )
    micro_batch_size: int | None = setting(
        "Samples a rank runs forward and backward at once; a larger share is accumulated. null: all at once.",
        at_least=1,
    )
    grad_clip_norm: float | None = setting(
        "Scale gradients whose norm over the whole model exceeds this; null: don't.", above=0
    )
    precision: str = setting(
        "fp32; bf16 and fp16 are mixed (float32 parameters, fp16 with loss scaling); fp64 is all double; "
        "auto: the fastest in a trial at the start, no lower than lowest_precision.",
        choices=("fp32", "bf16", "fp16", "fp64", "auto"),
    )
    lowest_precision: str = setting(
        "The lowest that precision=auto may choose.", choices=("fp32", "bf16"), default="fp32"
    )
    compile: bool | str = setting(
        "torch.compile the model; max: kernels chosen by trying them, and CUDA graphs; the start takes minutes.",
        choices=(False, True, "max"),
    )
    memory_format: str = setting(
        "Layout of images and convolution weights; auto: the fastest in a trial at the start.",
        choices=("auto", "contiguous", "channels_last"),
    )
    test_views: str = setting(
        "Views of an image whose logits are averaged in evaluation; flip_translate: as it is and moved by a pixel.",
        choices=("plain", "flip", "flip_translate"),
        default="plain",
    )
    deterministic: bool = setting(
        "Only deterministic kernels (an operation that has none is an error), and no bucket size by measurement."
    )
    log_every_steps: int = setting("Steps between logged metrics (each costs one small all-reduce).", at_least=1)
    progress: str = setting(
        "Live bar, plain lines, or neither; auto: a bar in a terminal.", choices=("auto", "bar", "lines", "off")
    )
    profile_steps: int = setting("Write a profiler trace of this many steps to TensorBoard; 0 for none.", at_least=0)


@dataclass
class CheckpointConfig:
    """When the state is saved below ``run_dir/checkpoints``."""

    every_epochs: int = setting("Save at the end of every so many epochs; the end of the run always saves.", at_least=1)
    every_steps: int | None = setting("Also save every so many steps; null: only at epochs.", at_least=1)
    every_minutes: float | None = setting("Also save after so many minutes without a save; null: don't.", above=0)
    background: bool = setting("Write while training goes on, from a copy; what goes wrong is told a step later.")
    keep: int = setting("How many of the newest to keep; the best by validation accuracy is kept besides.", at_least=1)


@dataclass
class RuntimeConfig:
    """Processes and devices."""

    device: str = setting("auto: cuda where torch sees a GPU, else cpu.", choices=("auto", "cpu", "cuda"))
    backend: str = setting("Process group backend; auto: nccl on cuda, gloo on cpu.", choices=("auto", "gloo", "nccl"))
    shared_memory: str = setting(
        "auto: on CPU, ranks of one host exchange tensors through memory; off: by the backend there too.",
        choices=("auto", "off"),
        default="auto",
    )
    threads: int | None = setting("CPU threads a rank; null: the host's cores shared among its ranks.", at_least=1)
    setup_timeout_seconds: float = setting("Ranks that don't meet within this time end with an error.", above=0)
    timeout_seconds: float = setting("A step, or a collective, that takes longer ends the run.", above=0)
    heartbeat_timeout_seconds: float = setting("A rank without a heartbeat for this long counts as failed.", above=0)


@dataclass
class Config:
    """A whole run's configuration."""

    strategy: StrategyConfig
    compression: CompressionConfig
    model: ModelConfig
    data: DataConfig
    task: TaskConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    logger: LoggerConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    runtime: RuntimeConfig
    seed: int = setting(
        "Fixes initial parameters, the order of samples, augmentation and dropout.", at_least=0, at_most=2**32 - 1
    )
    resume: str = setting("auto: the newest checkpoint of run_dir if there is one; never; or a checkpoint's path.")
    run_dir: str | None = setting("Folder of this run; null: outputs/<date>/<time>, chosen once by rank 0.")
    experiment: str | None = setting("Name of the experiment file the values came from.", default=None)
