"""What may be configured, and the checks that refuse the rest in one line.

The YAML files below ``conf/`` hold the values, one file a choice; the dataclasses registered here hold the types and
the limits. Each part of distrain registers the schema of its own choices beside its code (:func:`register`), so that a
new strategy, model or data set is one Python file and one YAML file. :func:`load` turns what Hydra composed into these
dataclasses, checked; everything behind it works with typed Python, never with a ``DictConfig``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import math
import operator
import pkgutil
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from distrain.files.untrusted import printable

T = TypeVar("T")


class ConfigError(ValueError):
    """What a user configured can't run; the message is one line that names the key, the value and the choices."""

    def __init__(self, key: str, value: object, problem: str, choices: Iterable[object] = ()) -> None:
        shown = list(choices)
        message = f"{key}={_show(value)}: {problem}" if value is not _ABSENT else f"{key}: {problem}"
        if shown:
            wrong = key.rpartition(".")[2] if value is _ABSENT else str(value)
            close = difflib.get_close_matches(wrong, [str(choice) for choice in shown], n=1)
            message += f"; choices: {', '.join(map(_show, shown))}"
            message += f" (did you mean {close[0]}?)" if close else ""
        super().__init__(printable(" ".join(message.split())))

    def __reduce__(self) -> tuple[Callable[[str], ConfigError], tuple[str]]:
        return refused, (str(self),)


class _Absent:
    def __repr__(self) -> str:
        return "???"


_ABSENT = _Absent()
#: How a value that is not there is shown.
NO_VALUE = str(_ABSENT)


def missing(key: str, problem: str, choices: Iterable[object] = ()) -> ConfigError:
    """A :class:`ConfigError` about a key that has no value to show."""
    return ConfigError(key, _ABSENT, problem, choices)


def refused(line: str) -> ConfigError:
    """The :class:`ConfigError` that another process raised, from its line."""
    return ConfigError.__new__(ConfigError, line)


def _show(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


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


# --- the groups: each choice's schema and the class or function that builds it ---------------------------------------


@dataclass(frozen=True)
class Choice:
    """One choice of a group: its schema, and what it builds."""

    group: str
    name: str
    schema: type[Any]
    target: Callable[..., Any]


_CHOICES: dict[str, dict[str, Choice]] = {}
#: Where each group's choices register themselves.
_GROUPS = {
    "strategy": "distrain.strategies",
    "compression": "distrain.compression",
    "model": "distrain.models",
    "data": "distrain.data",
    "loss": "distrain.optim.losses",
    "optimizer": "distrain.optim.optimizers",
    "scheduler": "distrain.optim.schedulers",
    "logger": "distrain.reporting.loggers",
}


def register(group: str, name: str, schema: type[Any]) -> Callable[[T], T]:
    """Class or function decorator: ``name`` is a choice of ``group``, checked by the dataclass ``schema``.

    Raises:
        ValueError: The name is taken.
    """

    def decorate(target: T) -> T:
        names = _CHOICES.setdefault(group, {})
        if name in names and names[name].target is not target:
            raise ValueError(f"{group}={name} is registered twice: {names[name].target} and {target}")
        names[name] = Choice(group, name, schema, cast(Callable[..., Any], target))
        return target

    return decorate


def choice(group: str, name: Any, key: str | None = None) -> Choice:
    """One choice of a group; imports the file that is named after it, and the group's others only if that isn't there.

    Args:
        group: The group.
        name: As the configuration has it.
        key: Where it stands, for the error; by default at the top.

    Raises:
        ConfigError: There is none of this name.
    """
    _import_files(group, only=name)
    found = _CHOICES.get(group, {}).get(name) or choices(group).get(name)
    if found is None:
        raise ConfigError(f"{key or group}.name", name, "unknown choice", choices(group))
    return found


def choices(group: str) -> dict[str, Choice]:
    """All choices of a group by name; imports every file of the group's package, so that each has registered.

    That takes long (some files need much of torch), so :func:`choice` serves where the name is known.
    """
    _import_files(group)
    return _CHOICES[group]


def _import_files(group: str, only: Any = None) -> None:
    package = importlib.import_module(_GROUPS[group])
    for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
        if only is None or module.name == only:
            importlib.import_module(f"{package.__name__}.{module.name}")


# --- schemas ---------------------------------------------------------------------------------------------------------


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
    heartbeat_timeout_seconds: float = setting("A rank that gives no sign of life for so long is gone.", above=0)


@dataclass
class Config:
    """A whole run's configuration."""

    strategy: StrategyConfig
    compression: CompressionConfig
    model: ModelConfig
    data: DataConfig
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


# --- from what Hydra composed to checked dataclasses -----------------------------------------------------------------


def load(composed: DictConfig | Mapping[str, Any]) -> Config:
    """Checks a composed configuration against the schemas.

    Args:
        composed: What Hydra composed, or the content of a run's ``config.yaml``.

    Returns:
        The same as dataclasses; groups are instances of the schema their ``name`` chose.

    Raises:
        ConfigError: An unknown key or choice, a wrong type, a value outside its limits.
    """
    node = composed if isinstance(composed, DictConfig) else OmegaConf.create(dict(composed))
    if not isinstance(node, DictConfig):
        raise missing("configuration", "is not a mapping of keys to values")
    fields = {f.name: f for f in dataclasses.fields(Config)}
    for key in node:
        if key not in fields:
            raise missing(str(key), "no such key", fields)
    values: dict[str, Any] = {}
    try:
        # While the whole is there to refer to: a group by itself can't follow ${…} to another.
        node = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(node, resolve=True)))
        # Groups last: their choices' files import torch, which a mistake elsewhere need not wait for.
        for key, spec in sorted(fields.items(), key=lambda item: item[0] in _GROUPS):
            if key in _GROUPS:
                values[key] = _choice(key, key, node.get(key))
            elif key in _SECTIONS:
                values[key] = _typed(key, _SECTIONS[key], node.get(key))
                _check_limits(key, values[key])
            elif key in node:
                values[key] = node[key]
            elif spec.default is None:
                values[key] = None
            else:
                raise missing(key, f"needs a value: {spec.metadata['doc']}")
        top = _typed("", _Top, OmegaConf.create({k: v for k, v in values.items() if k in _TOP_KEYS}))
    except OmegaConfBaseException as error:
        raise one_line(error) from error
    config = Config(**{**values, **{k: getattr(top, k) for k in _TOP_KEYS}})
    _check_limits("", config)
    return config


def checked(schema: type[T], composed: DictConfig) -> T:
    """A composed configuration of another command, checked against its schema.

    Raises:
        ConfigError: An unknown key, a wrong type, a value outside its limits.
    """
    settings = cast(T, _typed("", schema, composed))
    _check_limits("", settings)
    return settings


@dataclass
class _Top:
    seed: int = 0
    resume: str = "auto"
    run_dir: str | None = None
    experiment: str | None = None


_TOP_KEYS = [f.name for f in dataclasses.fields(_Top)]
_SECTIONS = {"trainer": TrainerConfig, "checkpoint": CheckpointConfig, "runtime": RuntimeConfig}


def _choice(group: str, key: str, node: Any) -> Any:
    """One choice of a group as the dataclass that its name picks; ``key`` is where it stands."""
    if not isinstance(node, DictConfig):
        raise ConfigError(key, node, f"needs one of the choices of conf/{group}", choices(group))
    return _typed(key, choice(group, node.get("name"), key).schema, node)


def _typed(key: str, schema: type[Any], node: Any) -> Any:
    _check_keys(key, schema, node)
    try:
        made: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    except ValidationError as error:
        raise _wrong_type(error, key, schema, node) from error
    except OmegaConfBaseException as error:
        raise one_line(error, prefix=key, schema=schema) from error
    for spec in dataclasses.fields(schema):
        group = spec.metadata.get("each")
        if group is not None:
            held = getattr(made, spec.name)
            for name in held:
                held[name] = _inner_choice(group, _join(_join(key, spec.name), str(name)), node[spec.name][name])
    return made


def _inner_choice(group: str, key: str, node: Any) -> Any:
    """A choice that is a value inside another one."""
    try:
        return _choice(group, key, node)
    except ConfigError as error:
        line = str(error)
        # A schema that compares its own keys names them by its group, which is not where they stand here.
        if line.startswith(f"{group}.") and not line.startswith(key):
            raise refused(key + line.removeprefix(group)) from error
        raise


def _check_keys(key: str, schema: type[Any], node: Any) -> None:
    if not isinstance(node, DictConfig):
        raise ConfigError(key, node, "must be a mapping of keys to values")
    wanted = typing.get_type_hints(schema)
    for name in map(str, node):
        if name not in wanted:
            raise missing(_join(key, name), "no such key", wanted)
        if dataclasses.is_dataclass(wanted[name]):
            _check_keys(_join(key, name), wanted[name], node[name])


def _wrong_type(error: ValidationError, prefix: str, schema: type[Any], node: DictConfig) -> ConfigError:
    path = str(error.full_key or "")
    wanted: Any = schema
    for name in path.partition("[")[0].split("."):
        wanted = typing.get_type_hints(wanted).get(name) if dataclasses.is_dataclass(wanted) else None
    if wanted is None:
        return one_line(error, prefix=prefix, schema=schema)
    # The whole list, where it is one of its elements that is wrong.
    key = path.partition("[")[0]
    return ConfigError(_join(prefix, key), OmegaConf.select(node, key), f"must be {_in_words(wanted)}")


def _in_words(wanted: Any) -> str:
    arguments = typing.get_args(wanted)
    if type(None) in arguments:
        return f"{_in_words(arguments[0])}, or null"
    if typing.get_origin(wanted) is list:
        return f"a list, each element {_in_words(arguments[0])}"
    if arguments and typing.get_origin(wanted) is not dict:
        return " or ".join(map(_in_words, arguments))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(wanted, "a mapping of keys to values")


_LIMITS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "above": (operator.gt, "greater than"),
    "at_least": (operator.ge, "at least"),
    "below": (operator.lt, "less than"),
    "at_most": (operator.le, "at most"),
}


def _check_limits(prefix: str, value: Any) -> None:
    for spec in dataclasses.fields(value):
        key, item = _join(prefix, spec.name), getattr(value, spec.name)
        if dataclasses.is_dataclass(item):
            _check_limits(key, item)
            continue
        if spec.metadata.get("each"):
            for name, inner in item.items():
                _check_limits(_join(key, name), inner)
            continue
        limits = spec.metadata
        allowed = limits.get("choices", ())
        for position, element in enumerate(item if isinstance(item, list) else [item]):
            if dataclasses.is_dataclass(element):
                _check_limits(f"{key}[{position}]", element)
                continue
            if isinstance(element, float) and not math.isfinite(element):
                raise ConfigError(key, element, "must be a finite number")
            if allowed and element not in allowed:
                raise ConfigError(key, element, "unknown choice", allowed)
            if isinstance(element, bool) or not isinstance(element, int | float):
                continue
            for name, (holds, words) in _LIMITS.items():
                limit = limits.get(name)
                if limit is not None and not holds(element, limit):
                    raise ConfigError(key, item, f"must be {words} {limit}")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def one_line(error: BaseException, prefix: str = "", schema: type[Any] | None = None) -> ConfigError:
    """Turns OmegaConf's several lines into one that names the key, the value and what was expected."""
    full_key = str(getattr(error, "full_key", "") or getattr(error, "key", "") or "")
    key = _join(prefix, full_key) if full_key and not full_key.startswith(prefix + ".") else full_key or prefix
    text = str(getattr(error, "msg", "") or error).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        meanings = {_join(prefix, f.name): f.metadata.get("doc") for f in dataclasses.fields(schema)} if schema else {}
        return missing(key, f"needs a value: {meanings[key]}" if meanings.get(key) else "needs a value")
    if isinstance(error, ConfigKeyError):
        names = [f.name for f in dataclasses.fields(schema)] if schema else ()
        return missing(key, "no such key", names)
    return missing(key or "configuration", text)


def to_container(config: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars, as ``config.yaml`` holds it."""
    return dataclasses.asdict(config)


def fingerprint(container: Mapping[str, Any]) -> str:
    """A hash of a resolved configuration (see :func:`to_container`); equal on all ranks or the run is refused."""
    return hashlib.sha256(json.dumps(container, sort_keys=True).encode()).hexdigest()


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[str, str]]:
    """Keys whose values differ, dotted, each with both values as text; ``NO_VALUE`` where there is none."""
    found: dict[str, tuple[str, str]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= changes(a, b, _join(prefix, key))
        elif a != b:
            found[_join(prefix, key)] = (_show(a), _show(b))
    return found


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, each as ``key: mine ≠ theirs``."""
    return [f"{key}: {a} ≠ {b}" for key, (a, b) in changes(mine, theirs).items()]


# --- building what the configuration names ---------------------------------------------------------------------------


def locate(key: str, path: str, *, allowed: Iterable[str] | None = None) -> Any:
    """The object at a dotted path.

    Args:
        key: The configuration key that holds the path, for the error.
        path: ``package.module.Name``.
        allowed: Prefixes a path may have, where the configuration comes from a stranger's run folder (nothing else is
            imported, since importing runs code); ``None`` trusts the path, as typed by the user.

    Raises:
        ConfigError: Not allowed, not a dotted path, not importable, or no such name.
    """
    if allowed is not None:
        prefixes = list(allowed)
        if not any(path == prefix or path.startswith(prefix.rstrip(".") + ".") for prefix in prefixes):
            names = ", ".join(prefixes)
            raise ConfigError(
                key, path, f"is not below {names}, and a run folder may build nothing else; allow=[…] adds to that"
            )
    module, dot, name = path.rpartition(".")
    if not dot or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(key, path, "is not a dotted path like package.module.Name")
    # Where the user stands, so that `my_package.Net` finds what lies there; last, so that it hides nothing. Not before
    # it is asked for: Hydra and torch import optional packages wherever they find them.
    if path.partition(".")[0] != __package__ and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ConfigError(key, path, f"can't be imported ({type(error).__name__}: {error})") from error
    try:
        return getattr(found, name)
    except AttributeError:
        raise ConfigError(key, path, f"module {module} has no {name}") from None
