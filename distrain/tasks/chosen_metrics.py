"""The metrics that ``metrics`` adds to a task's own: computed by torchmetrics, exactly over any number of ranks.

Each rank updates metrics of its own with the samples that it evaluates, and asks no other rank meanwhile. At the end
all ranks' states are gathered, and one rank reduces them as each metric says (sums are added, lists of samples joined),
computes the metrics and tells the others. So all ranks go on with the same numbers, to the last bit, on any hardware.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distrain.communication.collectives import Communicator
from distrain.config import registry, user_code
from distrain.config.schema import MetricConfig
from distrain.data.base import IGNORED, DataSpec
from distrain.data.batch import Targets
from distrain.errors import ConfigError, described
from distrain.tasks.base import Task
from distrain.tasks.known_metrics import OUTPUTS, PROBABILITIES, KnownMetric, find, known_metrics
from distrain.tasks.supervised import Supervised

#: Modules of torchmetrics whose classes a run folder may name: they compute, and load nothing.
_TRUSTED = ("torchmetrics.classification", "torchmetrics.regression", "torchmetrics.segmentation")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
#: Names of an evaluation's numbers that are no metrics.
_TAKEN = ("loss", "count", "correct")
#: Samples of a trial, on three ranks of which one has none; and the longest side in pixels of its masks.
_TRIED, _SIDE = (9, 0, 23), 8


@dataclass(frozen=True)
class ChosenValues:
    """The chosen metrics of a split.

    Attributes:
        values: Each metric; NaN where it is not defined.
        per_class: Numbers of each class, in the order of the classes, by name; ``None`` where one is not defined.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    per_class: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


class _Exact(TorchFunctionMode):
    """Computes in float64 what torchmetrics computes from integers: it would be float32, which has 7 digits."""

    _DIVISIONS = frozenset((Tensor.div, torch.div, torch.true_divide))
    _ARITHMETIC = frozenset((Tensor.mul, torch.mul, Tensor.add, torch.add, Tensor.sub, torch.sub, *_DIVISIONS))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called instead of each function of torch on this thread."""
        kwargs = kwargs or {}
        if func is Tensor.float:
            return args[0].double()
        if func in self._ARITHMETIC and not kwargs:
            # Of whole numbers only division, and a number of Python's with a fraction, make float32.
            makes_fractions = func in self._DIVISIONS or float in map(type, args)
            if makes_fractions and not any(isinstance(each, Tensor) and each.is_floating_point() for each in args):
                args = tuple(each.double() if isinstance(each, Tensor) else each for each in args)
        return func(*args, **kwargs)


class Accumulator:
    """The chosen metrics of the samples that this rank evaluates; nothing where none are chosen.

    Args:
        task: Chooses them, and says what outputs mean.
        device: Where the outputs will be.

    Raises:
        ConfigError: A metric is unknown, doesn't fit the task, or can't be made.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task = task
        own = {*task.validated_by_task, *task.further_results}
        self._metrics = [_Metric(config, task, device) for config in task.config.metrics if config.name not in own]

    def update(self, outputs: Tensor, targets: Targets) -> None:
        """Adds a batch of at least one sample."""
        if not self._metrics:
            return
        forms = {metric.form: self._task.compared(metric.form, outputs, targets) for metric in self._metrics}
        with _Exact():
            for metric in self._metrics:
                metric.update(*forms[metric.form])

    def finish(self, communicator: Communicator, device: torch.device) -> ChosenValues:
        """The metrics over all ranks; they call it together.

        Args:
            communicator: The ranks.
            device: Of the tensors that they exchange.
        """
        if not self._metrics:
            return ChosenValues()
        mine = {
            f"{number}/{name}": state for number, metric in enumerate(self._metrics) for name, state in metric.state()
        }
        gathered = communicator.all_gather_tensors(mine, device)
        content: dict[str, Any] = {}
        if communicator.rank == 0:
            content = {"values": {}, "per_class": {}}
            for number, metric in enumerate(self._metrics):
                prefix = f"{number}/"
                states = [
                    {name.removeprefix(prefix): state.cpu() for name, state in rank.items() if name.startswith(prefix)}
                    for rank in gathered
                ]
                value, per_class = metric.compute([state for state in states if state])
                content["values"][metric.name] = value
                content["per_class"] |= per_class
        return ChosenValues(**communicator.all_gather_json(content, device)[0])


class _Metric:
    """One metric, on one rank."""

    def __init__(self, config: MetricConfig, task: Task, device: torch.device) -> None:
        self._config, self._classes = config, len(task.spec.classes)
        self.name, self._known = config.name, _known(config, task)
        self.form = config.input or (self._known.form if self._known else _default_form(task))
        with warnings.catch_warnings():
            # That it keeps all samples, once for each rank and evaluation; the documentation says it.
            warnings.simplefilter("ignore")
            self._metric = self._make().to(device)
        self._updated = False

    def _make(self, **changed: Any) -> Any:
        """A new metric without samples."""
        config, known = self._config, self._known
        if known is None:
            assert config._target_ is not None
            metric = _make_target(config)
        else:
            metric = _class(config, f"torchmetrics.{known.target}")(**{**known.arguments, **changed})
        # The states are gathered here; by itself it would ask all processes of the job, servers too.
        metric.distributed_available_fn = _never
        for name, state in metric._defaults.items():
            if isinstance(state, Tensor) and state.is_floating_point():
                setattr(metric, name, state.double())
        return metric

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._updated = True
        self._metric.update(outputs, targets)

    def state(self) -> list[tuple[str, Tensor]]:
        """What this rank knows, by name; nothing if it has seen no sample."""
        found: list[tuple[str, Tensor]] = []
        for name in self._metric._defaults if self._updated else ():
            state = getattr(self._metric, name)
            if isinstance(state, Tensor):
                found.append((name, state))
            elif self._metric._reductions[name] is None:
                found += [(f"{name}/{number}", element) for number, element in enumerate(state)]
            elif state:
                found.append((f"{name}/0", torch.cat([torch.atleast_1d(element) for element in state])))
        return found

    def compute(self, states: Sequence[Mapping[str, Tensor]]) -> tuple[float, dict[str, list[float | None]]]:
        """The metric, and what it is for each class, from the states of the ranks that saw samples."""
        known = self._known
        value = self._computed(self._make(), states)
        if known is not None and known.is_ranking:
            joined = torch.cat([state["target/0"] for state in states])
            value = torch.where(_can_be_ranked(joined, self._classes), value, math.nan)
        if value.dim() == 0:
            per_class = None
            if known is not None and known.per_class:
                per_class = self._computed(self._make(average="none"), states)
        else:
            per_class, value = value, value.nanmean()
        if per_class is None or per_class.shape != (self._classes,):
            return float(value), {}
        name = known.per_class if known is not None and known.per_class else self.name
        return float(value), {name: [number if math.isfinite(number) else None for number in per_class.tolist()]}

    def _computed(self, metric: Any, states: Sequence[Mapping[str, Tensor]]) -> Tensor:
        _restore(metric, states)
        metric._update_count = len(states)
        with warnings.catch_warnings(), _Exact():
            # Of classes without samples; they are left out, which is documented.
            warnings.simplefilter("ignore")
            value = metric.compute()
        if not isinstance(value, Tensor) or value.dim() > 1 or value.is_complex():
            kind = (
                f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise TypeError(f"gives {kind}; a number, or one for each class, is needed")
        return value.double()


def _restore(metric: Any, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Gives a new metric the states of several ranks, reduced as it says."""
    for name, default in metric._defaults.items():
        reduction = metric._reductions[name]
        if not isinstance(default, Tensor):
            elements = [state[key] for state in states for key in state if key.startswith(f"{name}/")]
            setattr(metric, name, elements if reduction is None or not elements else [torch.cat(elements)])
            continue
        parts = [state[name] for state in states if name in state]
        if not parts:
            continue
        if reduction is None:
            # Its class expects a new dimension only where several ranks have samples.
            setattr(metric, name, torch.stack(parts) if len(parts) > 1 else parts[0])
        else:
            setattr(metric, name, reduction(torch.stack(parts)))


def _never() -> bool:
    return False


def _can_be_ranked(targets: Tensor, classes: int) -> Tensor:
    """Which classes have both samples and others: bool ``[classes]``."""
    own = targets.sum(0) if targets.dim() > 1 else torch.bincount(targets, minlength=classes)
    return (own > 0) & (own < len(targets))


# --- which metric a name or a path means -----------------------------------------------------------------------------


def _default_form(task: Task) -> str:
    return PROBABILITIES if task.target in ("class", "labels", "mask") else OUTPUTS


def _known(config: MetricConfig, task: Task) -> KnownMetric | None:
    """The metric of a name; ``None`` for one that ``_target_`` names."""
    if config._target_ is not None:
        return None
    kind = task.target if isinstance(task, Supervised) else None
    found = find(config.name, task.spec, kind)
    if found is None:
        raise ConfigError("metrics", config.name, f"no such metric of task={task.config.task.name}", names(task))
    return found


def names(task: Task) -> list[str]:
    """The metrics that ``metrics`` knows by name for this task."""
    kind = task.target if isinstance(task, Supervised) else None
    return list(dict.fromkeys((*task.validated_by_task, *task.further_results, *known_metrics(task.spec, kind))))


def _class(config: MetricConfig, path: str) -> Any:
    if path.startswith("torchmetrics."):
        try:
            import torchmetrics  # noqa: F401
        except ImportError as error:
            problem = f"needs torchmetrics ({error}); run pip install 'distrain[metrics]'"
            raise ConfigError("metrics", config.name, problem) from error
    return registry.locate("metrics", path)


def _make_target(config: MetricConfig) -> Any:
    """A metric of the user's."""
    path = str(config._target_)
    target = _class(config, path)
    from torchmetrics import Metric

    if not isinstance(target, type) or not issubclass(target, Metric):
        raise ConfigError("metrics", path, "is not a class of torchmetrics.Metric")
    user_code.check_arguments("metrics", config.kwargs, path, target, config.kwargs)
    metric = user_code.build("metrics", path, lambda: target(**config.kwargs))
    if not metric._defaults:
        problem = "has no state of its own (add_state), as a wrapper or a collection; name the metrics one by one"
        raise ConfigError("metrics", path, problem)
    return metric


def check_allowed(config: MetricConfig, allowed: Sequence[str]) -> None:
    """Refuses a metric that a run folder names, unless it is torchmetrics' or the user allows it; imports only such.

    Raises:
        ConfigError: It is not allowed.
    """
    path = config._target_
    if path is not None and path.rpartition(".")[0] not in _TRUSTED:
        registry.check_target("metrics", path, allowed)


# --- what can be refused before there are ranks ----------------------------------------------------------------------


def check(task: Task) -> dict[str, bool | None]:
    """Tries the chosen metrics on random outputs, as one rank and as three.

    Returns:
        Whether a larger value of each metric is better; ``None`` where its class doesn't say it.

    Raises:
        ConfigError: A metric is unknown, doesn't fit the task, fails, or isn't the same on several ranks.
    """
    cpu, directions = torch.device("cpu"), {}
    own = {*task.validated_by_task, *task.further_results}
    for config in task.config.metrics:
        if not _NAME.fullmatch(config.name) or config.name in _TAKEN:
            raise ConfigError("metrics", config.name, "can't be a metric's name: choose another one by name=…")
        if config._target_ is None and (config.kwargs or config.input):
            raise ConfigError("metrics", config.name, "takes no kwargs and no input: they are of _target_")
        if config.name in own:
            if config._target_ is not None:
                problem = "is the name of a metric of the task itself: choose another one by name=…"
                raise ConfigError("metrics", config.name, problem)
            continue
        metric = _Metric(config, task, cpu)
        directions[config.name] = metric._metric.higher_is_better
        try:
            _try(config, task)
        except ConfigError:
            raise
        except Exception as error:  # a user's metric may raise anything
            raise ConfigError("metrics", config._target_ or config.name, f"fails {described(error)}") from error
    return directions


def _try(config: MetricConfig, task: Task) -> None:
    outputs, targets = _drawn(task, sum(_TRIED))
    whole = _of_ranks(config, task, [(outputs, targets)])
    ranks = list(zip(outputs.split(_TRIED), targets.split(_TRIED), strict=True))
    divided = _of_ranks(config, task, ranks)
    if not math.isclose(whole, divided, rel_tol=1e-9, abs_tol=1e-12) and not (
        math.isnan(whole) and math.isnan(divided)
    ):
        problem = (
            f"is {whole:.6g} for {sum(_TRIED)} random samples and {divided:.6g} if three ranks share them: its states "
            "don't add up; add_state(dist_reduce_fx=…) of sums or of lists of samples, not of means, does"
        )
        raise ConfigError("metrics", config._target_ or config.name, problem)


def _of_ranks(config: MetricConfig, task: Task, shares: Sequence[tuple[Tensor, Tensor]]) -> float:
    states, cpu = [], torch.device("cpu")
    for outputs, targets in shares:
        metric = _Metric(config, task, cpu)
        if len(outputs):
            with warnings.catch_warnings(), _Exact():
                warnings.simplefilter("ignore")
                for part in (slice(0, 5), slice(5, None)):
                    metric.update(*task.compared(metric.form, outputs[part], targets[part]))
            states.append(dict(metric.state()))
    return _Metric(config, task, cpu).compute(states)[0]


def _drawn(task: Task, count: int) -> tuple[Tensor, Tensor]:
    """Random outputs and targets of samples."""
    generator, spec = torch.Generator().manual_seed(0), task.spec
    channels, *place = task.output_shape
    place = [min(side, _SIDE) for side in place]
    outputs = torch.randn(count, channels, *place, generator=generator)
    return outputs, _drawn_targets(spec, count, place, generator)


def _drawn_targets(spec: DataSpec, count: int, place: Sequence[int], generator: torch.Generator) -> Tensor:
    size = len(spec.classes)
    if spec.target == "numbers":
        return torch.randn(count, size, generator=generator)
    if spec.target == "labels":
        return torch.randint(2, (count, size), generator=generator, dtype=torch.uint8)
    if spec.target == "class":
        return torch.randint(size, (count,), generator=generator)
    masks = torch.randint(size, (count, *place), generator=generator).to(torch.uint8)
    masks[:, 0, 0] = IGNORED
    return masks
