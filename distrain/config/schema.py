"""Schema of a run's configuration: every key with its type, limits, meaning and effect.

The YAML files below ``conf/`` contain the values, one file per choice; these dataclasses define the types and limits.
:func:`distrain.config.load.load_config` turns a configuration composed by Hydra into these dataclasses and checks it.
All other code uses the dataclasses, never a ``DictConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distrain.config.augment import AugmentConfig
from distrain.config.groups import (
    CompressionConfig,
    DataConfig,
    GroupConfig,
    LoggerConfig,
    LookaheadConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    StrategyConfig,
    TaskConfig,
)
from distrain.config.setting import Effect, section_affects, setting

#: What choices that users add import from here; distrain itself imports each name from where it is defined.
__all__ = [
    "DEVICES",
    "DEVICE_DOC",
    "AugmentConfig",
    "CallbackConfig",
    "CheckpointConfig",
    "CompressionConfig",
    "Config",
    "DataConfig",
    "Effect",
    "EmaConfig",
    "FreezeConfig",
    "GroupConfig",
    "InitConfig",
    "LoggerConfig",
    "LookaheadConfig",
    "LoraConfig",
    "LossConfig",
    "MetricConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PruneConfig",
    "RuntimeConfig",
    "SchedulerConfig",
    "StrategyConfig",
    "SwaConfig",
    "TaskConfig",
    "TrainerConfig",
    "setting",
]


@dataclass
class InitConfig:
    """Where initial parameters come from. None of this has an effect on a run that is resumed."""

    weights: str | None = setting(
        "Start from these weights: the folder of a run (its newest checkpoint) or of a checkpoint; a file "
        ".safetensors, .pt, .pth, .bin or .ckpt, whose tensors alone are read; or hf://USER/NAME on the Hugging Face "
        "hub; null: random ones from the seed.",
        path=True,
        default=None,
    )
    rename: list[list[str]] = setting(
        "Changes of the names of the weights, one after the other: pairs of a regular expression and its replacement.",
        default_factory=list,
    )
    exclude: list[str] = setting(
        "Shell patterns of the model's names, such as head.*, that keep their random initial values.",
        default_factory=list,
    )


@dataclass
class FreezeConfig:
    """Parameters that are not trained in the first epochs."""

    match: str = setting(
        "Shell pattern of the parameters' names, such as layer1.*; head: those of the model's last layer. For a "
        "parameter the first entry counts that matches."
    )
    epochs: int | None = setting(
        "They are frozen in this many first epochs; null: in all; 0: in none, whatever later entries say.",
        at_least=0,
        default=None,
    )


@dataclass
class LoraConfig:
    """LoRA: the weights of linear layers and 1×1 convolutions stay, and the product of two small matrices is added."""

    rank: int | None = setting(
        "Rows of each layer's matrix A and columns of its B, whose product B A is added to the weight; null: no LoRA, "
        "the other keys of lora have no effect.",
        at_least=1,
        default=None,
    )
    alpha: float | None = setting("The product is multiplied by alpha / rank; null: by 1.", above=0, default=None)
    match: list[str] | None = setting(
        "Shell patterns of the names of linear layers and 1×1 convolutions that have it, such as *.qkv; head: the "
        "model's last layer. null: all but the last one.",
        default=None,
    )
    also_train: list[str] = setting(
        "Shell patterns of the names of other parameters that are trained; head: those of the model's last layer. All "
        "others are frozen.",
        default_factory=lambda: ["head"],
    )


@dataclass
class PruneConfig:
    """Pruning: the weights of smallest magnitude become zero during the training, and stay zero."""

    amount: float | None = setting(
        "Share of the weights of convolutions and linear layers that are zero in the end, the smallest of the whole "
        "model, such as 0.8; null: none, the other keys of prune have no effect.",
        above=0,
        below=1,
        default=None,
    )
    rise_epochs: float | None = setting(
        "In so many first epochs the share rises, fast at first; the rest of the run trains what is left. 0: all "
        "before the first step; null: in half of the run.",
        at_least=0,
        default=None,
    )
    rounds: int = setting("In so many rounds, at equal distances, the share rises.", at_least=1, default=10)
    exclude: list[str] = setting(
        "Shell patterns of the names of weights that are not pruned, such as conv1.*; head: those of the model's last "
        "layer.",
        default_factory=lambda: ["head"],
    )


@dataclass
class MetricConfig:
    """A metric of the evaluations, besides those that the task has itself."""

    name: str = setting("Name of the metric, known to distrain; with _target_, any name.")
    _target_: str | None = setting("Dotted path of a class of torchmetrics.Metric.", default=None)
    kwargs: dict[str, Any] = setting("Keyword arguments for the class.", default_factory=dict)
    input: str | None = setting(
        "What the class is given besides the targets: the predicted classes, their probabilities, or the model's "
        "outputs; null: probabilities where the task has them, else outputs.",
        choices=(None, "decisions", "probabilities", "outputs"),
        default=None,
    )


@dataclass
class CallbackConfig:
    """A callback, which the trainer calls at fixed points."""

    name: str = setting("Name of the callback, known to distrain; with _target_, any name.")
    _target_: str | None = setting("Dotted path of a class of distrain.Callback.", default=None)
    kwargs: dict[str, Any] = setting("Keyword arguments for the class.", default_factory=dict)


@dataclass
class EmaConfig:
    """An exponential moving average of parameters and buffers, which is evaluated and saved beside the model."""

    decay: float | None = setting(
        "Weight of the average against the model in an update of the average; null: no such average.",
        at_least=0,
        below=1,
        default=None,
    )
    every: int = setting("Steps between updates of the average.", at_least=1, default=1)
    warmup: bool = setting(
        "Update k of the average, from 0, has the decay 1 - (1 + k) ** (-2/3) where that is less, so that the first "
        "models are forgotten.",
        default=True,
    )


@dataclass
class SwaConfig:
    """Stochastic weight averaging: the mean of models of the last epochs, evaluated and saved beside the model."""

    from_epoch: int | None = setting(
        "Epoch, from 1, whose model at its end is the first to be averaged; null: no such average.",
        at_least=1,
        default=None,
    )
    every: int | None = setting(
        "Steps between the models that are averaged after it; null: those at the ends of epochs.",
        at_least=1,
        default=None,
    )
    batchnorm: str = setting(
        "Statistics of BatchNorm layers. measured: by a pass over the training data before the average is evaluated; "
        "averaged: the mean of the models'.",
        choices=("measured", "averaged"),
        default="measured",
    )


@dataclass
class TrainerConfig:
    """The training loop."""

    epochs: int = setting("Passes over the training samples.", at_least=1, affects=("schedule",))
    max_steps: int | None = setting(
        "End the run after this many steps, with its evaluation, checkpoint and summary; null: no limit.",
        at_least=1,
        affects=("schedule",),
    )
    max_minutes: float | None = setting(
        "After this many minutes, save and exit with code 75; the same command resumes. null: no limit.", above=0
    )
    on_nonfinite: str = setting(
        "If a gradient is NaN or infinite: stop the run, skip the update, or rewind to the newest checkpoint.",
        choices=("stop", "skip", "rewind"),
    )
    micro_batch_size: int | str | None = setting(
        "Largest number of samples in one pass of a rank; gradients of several passes are accumulated. "
        "null: a rank's whole share of the batch in one pass; auto: as few passes as runtime.memory_limit_mb allows, "
        "by a trial at the start of the run.",
        words=("auto",),
        at_least=1,
    )
    grad_clip_norm: float | None = setting(
        "Scale the gradient down if its norm over the whole model exceeds this; null: never.", above=0
    )
    precision: str = setting(
        "fp32 or fp64: for everything. bf16 or fp16: mixed precision with float32 parameters (fp16 with loss scaling). "
        "auto: the fastest in a trial at the start of the run, but not below lowest_precision.",
        choices=("fp32", "bf16", "fp16", "fp64", "auto"),
    )
    lowest_precision: str = setting(
        "The lowest precision that precision=auto may choose.", choices=("fp32", "bf16"), default="fp32"
    )
    compile: bool | str = setting(
        "true: use torch.compile; max: also choose kernels by timing and use CUDA graphs, so the start takes minutes.",
        choices=(False, True, "max"),
    )
    memory_format: str = setting(
        "Memory layout of images and convolution weights; auto: the fastest in a trial at the start of the run.",
        choices=("auto", "contiguous", "channels_last"),
    )
    test_views: str = setting(
        "Views of an image over which evaluation averages logits: the plain image; flip: also its mirror image; "
        "flip_translate: also both moved by one pixel in two directions.",
        choices=("plain", "flip", "flip_translate"),
        default="plain",
    )
    deterministic: bool = setting(
        "Use only deterministic kernels (an operation without one is an error), and no bucket sizes by measurement."
    )
    log_every_steps: int = setting("Steps between two logs of metrics; each log costs a small all-reduce.", at_least=1)
    progress: str = setting(
        "Progress on the terminal: a live bar, plain lines, or off (only in the log file); auto: a bar if it is a "
        "terminal, else lines.",
        choices=("auto", "bar", "lines", "off"),
        affects=("execution",),
    )
    profile_steps: int = setting(
        "Write a profiler trace of this many steps to the run's tensorboard folder; 0: none.", at_least=0
    )
    monitor: str | None = setting(
        "What the best checkpoint and trainer.patience go by: val/ and a metric of the validation, or val/loss; "
        "val/ema_ and val/swa_ are those of averages. null: the task's own, such as val/accuracy, of the EMA if there "
        "is one.",
        default=None,
    )
    mode: str | None = setting(
        "Whether more (max) or less (min) of trainer.monitor is better; null: as the metric says.",
        choices=(None, "max", "min"),
        default=None,
    )
    patience: int | None = setting(
        "End the run, with its evaluation, checkpoint and summary, after so many epochs in a row in which "
        "trainer.monitor did not get better; null: never.",
        at_least=1,
        default=None,
    )
    min_delta: float = setting(
        "A smaller change of trainer.monitor is no improvement for trainer.patience.", at_least=0, default=0.0
    )
    ema: EmaConfig = setting("An exponential moving average of the model.", default_factory=EmaConfig)
    swa: SwaConfig = setting("Stochastic weight averaging.", default_factory=SwaConfig)

    @property
    def largest_pass(self) -> int | None:
        """Largest number of samples in a pass; ``None``: no limit, or one that a trial has still to find."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else None


@dataclass
class CheckpointConfig:
    """When checkpoints are saved in ``run_dir/checkpoints``."""

    every_epochs: int = setting("Epochs between checkpoints; the end of the run always saves one.", at_least=1)
    every_steps: int | None = setting("Steps between further checkpoints; null: none.", at_least=1)
    every_minutes: float | None = setting(
        "Also save if there was no save for this many minutes; null: no such saves.", above=0
    )
    background: bool = setting(
        "Write from a copy in the background while training continues; errors appear at a later step."
    )
    keep: int = setting(
        "Number of newest checkpoints to keep, in addition to the one with the best validation score.", at_least=1
    )


#: Choices of ``runtime.device`` and of the key ``device`` of commands, and their meaning.
DEVICES = ("auto", "cpu", "cuda", "mps")
DEVICE_DOC = "Device; auto: cuda if torch finds a GPU, else cpu; mps: an Apple GPU, on one rank."


@dataclass
class RuntimeConfig:
    """Processes and devices."""

    device: str = setting(DEVICE_DOC, choices=DEVICES)
    backend: str = setting(
        "Backend of process groups; auto: nccl on cuda, gloo on cpu.", choices=("auto", "gloo", "nccl")
    )
    shared_memory: str = setting(
        "auto: on CPU, ranks of one host exchange tensors through shared memory; off: through the backend.",
        choices=("auto", "off"),
        default="auto",
    )
    threads: int | None = setting(
        "CPU threads per rank; null: MKL_NUM_THREADS or OMP_NUM_THREADS if you set it, else the host's cores divided "
        "by its number of ranks.",
        at_least=1,
    )
    memory_limit_mb: float | None = setting(
        "MiB that a rank may take for parameters, gradients, optimizer, activations and messages; what "
        "model.checkpoint_activations=auto and trainer.micro_batch_size=auto go by. null: nine tenths of what is free "
        "at the start of the run, divided among the ranks of a host.",
        above=0,
        default=None,
    )
    setup_timeout_seconds: float = setting(
        "The run fails if not all ranks have joined within this many seconds.", above=0
    )
    timeout_seconds: float = setting("The run fails if a step or a collective takes longer, in seconds.", above=0)
    heartbeat_timeout_seconds: float = setting(
        "A rank without a heartbeat for this many seconds counts as failed.", above=0
    )


@dataclass
class Config:
    """The configuration of a run."""

    strategy: StrategyConfig
    compression: CompressionConfig
    model: ModelConfig
    data: DataConfig
    task: TaskConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig = field(metadata=section_affects("schedule"))
    logger: LoggerConfig = field(metadata=section_affects("execution"))
    trainer: TrainerConfig
    checkpoint: CheckpointConfig = field(metadata=section_affects("execution"))
    runtime: RuntimeConfig = field(metadata=section_affects("execution"))
    seed: int = setting(
        "Determines initial parameters, the order of samples, augmentation and dropout.",
        at_least=0,
        at_most=2**32 - 1,
        affects=("sample_order",),
    )
    resume: str = setting(
        "Checkpoint to resume: auto (the newest in run_dir, if there is one), never, or the path of a checkpoint.",
        affects=("identity",),
        path=True,
    )
    run_dir: str | None = setting(
        "Folder of this run; null: outputs/<date>/<time>, chosen by rank 0.", affects=("identity",), path=True
    )
    init: InitConfig = field(default_factory=InitConfig, metadata=section_affects("start"))
    lora: LoraConfig = field(default_factory=LoraConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    freeze: list[FreezeConfig] = setting(
        "Parameters that keep their initial values, for ever or in the first epochs.", default_factory=list
    )
    plan: str | None = setting(
        "Folder of a plan to compare with; null: run_dir.", default=None, affects=("identity",), path=True
    )
    metrics: list[MetricConfig] = setting(
        "Further metrics of evaluations: names such as f1_macro or auroc, or {_target_: a class of "
        "torchmetrics.Metric, kwargs: {…}}.",
        default_factory=list,
        affects=("execution",),
    )
    callbacks: list[CallbackConfig] = setting(
        "What is called at fixed points of the training: names such as gradient_histograms, filters or notify, "
        "{name: …, kwargs: {…}}, or {_target_: a class of distrain.Callback, kwargs: {…}}.",
        default_factory=list,
        affects=("execution",),
    )
    experiment: str | None = setting(
        "Name of the experiment file that set values.", default=None, affects=("identity",)
    )
