"""Running averages of the model: an exponential one, and stochastic weight averaging.

Each rank averages what it keeps of the model, so updates need no communication: a stage of a pipeline has the average
of its own part, and a rank that keeps slices of parameters has those of the averages. Buffers of floating point, such
as BatchNorm's statistics, are averaged like parameters, as timm and
``torch.optim.swa_utils.AveragedModel(use_buffers=True)`` do. Those of stochastic weight averaging are measured anew
before they are used; see :mod:`distrain.training.batchnorm_statistics`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import module_state
from distrain.checkpoint.format import AVERAGES
from distrain.checkpoint.progress import Progress
from distrain.checkpoint.restore_report import RestoredPart
from distrain.checkpoint.saved_tensors import TensorSlice
from distrain.config.schema import Config, TrainerConfig
from distrain.data.loader import Loader
from distrain.errors import ConfigError
from distrain.strategies.base import Strategy
from distrain.tasks.base import Evaluation, Task
from distrain.torch_internals import foreach_copy, foreach_lerp
from distrain.training import batchnorm_statistics


def names(config: TrainerConfig) -> list[str]:
    """The averages that a run keeps, of ``ema`` and ``swa``."""
    kept = {"ema": config.ema.decay, "swa": config.swa.from_epoch}
    return [name for name, value in kept.items() if value is not None]


def validated(task: Task) -> list[str]:
    """Names of the metrics of a run's validations: the task's own, and those and the loss of each average."""
    own = list(task.validated)
    return own + [f"{average}_{name}" for average in names(task.config.trainer) for name in ("loss", *own)]


def without_average(name: str) -> str:
    """A metric's name without the average that it is of."""
    average, _, rest = name.partition("_")
    return rest if average in AVERAGES and rest else name


def check(config: Config) -> None:
    """Refuses averages that would never begin, or of an optimizer that averages by itself.

    Raises:
        ConfigError: One line that names the key.
    """
    trainer, optimizer = config.trainer, config.optimizer
    if trainer.swa.from_epoch is not None and trainer.swa.from_epoch > trainer.epochs:
        problem = f"is after the last epoch, trainer.epochs={trainer.epochs}"
        raise ConfigError("trainer.swa.from_epoch", trainer.swa.from_epoch, problem)
    for key, value in (("ema.decay", trainer.ema.decay), ("swa.from_epoch", trainer.swa.from_epoch)):
        if value is not None and optimizer.has_modes:
            raise ConfigError(f"trainer.{key}", value, f"optimizer={optimizer.name} averages by itself", ["null"])


class Average:
    """One running average of a rank's tensors.

    Args:
        name: ``ema`` or ``swa``.
        tensors: The model's by name; copied.
        weight: The model's share in an update, from the number of updates before; the first one copies the model.
        is_due: Whether a step, after which a run is at a position, is followed by an update; the last argument is
            whether it ends an epoch.
        measures: Whether BatchNorm's statistics are measured after updates.

    Attributes:
        name: As above.
        tensors: The average by name.
        updates: How many there were.
        measured: How many there were when BatchNorm's statistics were measured.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        weight: Callable[[int], float],
        is_due: Callable[[Progress, bool], bool],
        *,
        measures: bool = False,
    ) -> None:
        self.name, self.updates, self.measured, self._measures = name, 0, 0, measures
        self.tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        self.is_due = is_due
        self._weight = weight

    @property
    def needs_measuring(self) -> bool:
        """Whether BatchNorm's statistics are to be measured before the average is used."""
        return self._measures and self.measured < self.updates

    def update(self, model: list[Tensor]) -> None:
        """Moves the average towards the model, whose tensors are in the same order."""
        own = list(self.tensors.values())
        if own and self.updates:
            foreach_lerp(own, model, self._weight(self.updates))
        elif own:
            foreach_copy(own, model)
        self.updates += 1


class Averages:
    """The averages that a run keeps; all ranks that train call its methods together.

    Args:
        config: The keys of the section ``trainer``.
        strategy: Set up; holds the model.
        loader: Of the training samples.

    Attributes:
        unsaved: Whether statistics were measured since :meth:`add_to` was called.
    """

    def __init__(self, config: TrainerConfig, strategy: Strategy, loader: Loader) -> None:
        self._strategy, self._loader, self.unsaved = strategy, loader, False
        kept = names(config)
        self._model = _ModelTensors(strategy if kept else None)
        makers = {"ema": _ema, "swa": _swa}
        tensors = dict(zip(self._model.names, self._model.current(), strict=True))
        self._averages = [makers[name](config, tensors) for name in kept]

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Updates the averages that are due after a step."""
        ends_epoch = progress.epoch_samples >= self._loader.sampler.count
        due = [average for average in self._averages if average.is_due(progress, ends_epoch)]
        if due:
            model = self._model.current()
            for average in due:
                average.update(model)

    def evaluate(self, evaluate: Callable[[], Evaluation], why_stop: Callable[[], str | None]) -> Evaluation:
        """Evaluates the model, and each average in its place; one that has not begun is the model.

        Args:
            evaluate: Evaluates the model that the strategy holds.
            why_stop: As for :func:`distrain.training.batchnorm_statistics.measure`.

        Returns:
            The model's evaluation; the loss and the metrics of averages are among its metrics, such as
            ``ema_accuracy``.

        Raises:
            EvaluationStopped: All ranks stop.
        """
        self.measure_statistics(why_stop)
        found = evaluate()
        metrics = dict(found.metrics)
        for average in self._averages:
            other = found
            if average.updates:
                with self._in_place_of_model(average):
                    other = evaluate()
            numbers = {"loss": other.loss, **other.metrics}
            metrics |= {f"{average.name}_{name}": value for name, value in numbers.items()}
        return dataclasses.replace(found, metrics=metrics)

    @torch.no_grad()
    def measure_statistics(self, why_stop: Callable[[], str | None]) -> None:
        """Measures the BatchNorm statistics of averages that were updated since; all ranks call it together.

        Args:
            why_stop: As for :func:`distrain.training.batchnorm_statistics.measure`.

        Raises:
            EvaluationStopped: All ranks stop.
        """
        for average in self._averages:
            if average.needs_measuring:
                with self._in_place_of_model(average):
                    if batchnorm_statistics.measure(self._strategy, self._loader, why_stop):
                        foreach_copy(list(average.tensors.values()), self._model.current())
                        self.unsaved = True
                average.measured = average.updates

    @contextlib.contextmanager
    def _in_place_of_model(self, average: Average) -> Iterator[None]:
        """The model holds the average in this block, and afterwards the same bits as before."""
        self._strategy.agree_on_average(average.tensors)
        model = self._model.current()
        if not model:
            yield
            return
        before = [tensor.clone() for tensor in model]
        foreach_copy(model, list(average.tensors.values()))
        try:
            yield
        finally:
            foreach_copy(model, before)

    def add_to(self, state: dict[str, Any]) -> None:
        """Adds the averages to what a strategy saves: each rank those of the model's tensors that it saves."""
        if not self._averages:
            return
        saved: dict[str, Tensor] = {}
        slices: dict[str, TensorSlice] = {}
        of_model = state.get("slices", {}).get("model", {})
        for average in self._averages:
            self._strategy.agree_on_average(average.tensors)
            for key, tensor in average.tensors.items() if average.updates else ():
                # Also where another rank saves it: ranks may put it together of their parts.
                part = self._strategy.saved_part(key, tensor)
                if key in state["model"]:
                    saved[f"{average.name}/{key}"] = part
                if key in of_model:
                    slices[f"{average.name}/{key}"] = of_model[key]
        state["average"] = saved
        state["slices"] = {**state.get("slices", {}), "average": slices}
        state["scalars"]["averages"] = {each.name: each.updates for each in self._averages if each.updates}
        state["scalars"]["measured_averages"] = {each.name: each.measured for each in self._averages if each.measured}
        self.unsaved = False

    @torch.no_grad()
    def load(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        """Restores what :meth:`add_to` added under this or another strategy.

        Raises:
            ValueError: A tensor is missing or has another shape.
        """
        updates: Mapping[str, int] = saved["scalars"].get("averages", {})
        measured: Mapping[str, int] = saved["scalars"].get("measured_averages", {})
        parts = []
        for average in self._averages:
            average.updates, average.measured = updates.get(average.name, 0), measured.get(average.name, 0)
            part = f"average {average.name}"
            if not average.updates:
                parts.append(RestoredPart(part, "absent", "none was saved; it begins with this run's model"))
                continue
            for key, tensor in average.tensors.items():
                whole = saved["average"].get(f"{average.name}/{key}")
                found = None if whole is None else self._strategy.part_of(key, whole)
                if found is None or found.shape != tensor.shape:
                    raise ValueError(f"the saved average {average.name} is not of this model: {key} differs")
                tensor.copy_(found)
            parts.append(RestoredPart(part, "exact", f"{average.updates} updates"))
        kept = {average.name for average in self._averages}
        parts += [
            RestoredPart(f"average {name}", "reset", "this run keeps none") for name in updates if name not in kept
        ]
        return parts


class _ModelTensors:
    """What a rank keeps of the parameters and floating-point buffers that belong to the state of its modules.

    Args:
        strategy: Holds the modules; ``None`` for no tensors.
    """

    def __init__(self, strategy: Strategy | None) -> None:
        self._parameters: dict[str, Tensor] = {}
        # A forward pass may replace a buffer by a new tensor, so its owner is kept.
        self._buffers: dict[str, tuple[nn.Module, str]] = {}
        if strategy is None:
            return
        kept = strategy.kept_parameters()
        for module in strategy.own_modules():
            parameters = dict(module.named_parameters(remove_duplicate=False))
            for name, tensor in module_state.read(module).tensors.items():
                owner, _, key = name.rpartition(".")
                if name in parameters:
                    # Of a parameter that ranks share this one may have nothing.
                    self._parameters |= {name: kept[name]} if name in kept else {}
                elif tensor.is_floating_point() and not module_state.is_extra_state(name):
                    self._buffers[name] = module.get_submodule(owner), key

    @property
    def names(self) -> list[str]:
        """The tensors' names."""
        return [*self._parameters, *self._buffers]

    def current(self) -> list[Tensor]:
        """The tensors in the order of their names, as the modules hold them now."""
        buffers = [getattr(owner, key).detach() for owner, key in self._buffers.values()]
        return [*self._parameters.values(), *buffers]


def _ema(config: TrainerConfig, tensors: Mapping[str, Tensor]) -> Average:
    """An exponential moving average; the warm-up is that of timm's ``ModelEmaV3`` (``use_warmup``)."""
    keys = config.ema
    decay = keys.decay or 0.0

    def weight(updates: int) -> float:
        return 1 - (min(decay, 1 - (1 + updates) ** (-2 / 3)) if keys.warmup else decay)

    return Average("ema", tensors, weight, lambda progress, ends_epoch: progress.step % keys.every == 0)


def _swa(config: TrainerConfig, tensors: Mapping[str, Tensor]) -> Average:
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407): the mean of all models that are taken."""
    keys = config.swa
    first = keys.from_epoch or 0

    def is_due(progress: Progress, ends_epoch: bool) -> bool:
        begins = ends_epoch and progress.epoch + 1 == first
        if keys.every is None:
            return ends_epoch and progress.epoch + 1 >= first
        return begins or (progress.epoch >= first and progress.step % keys.every == 0)

    return Average("swa", tensors, lambda updates: 1 / (updates + 1), is_due, measures=keys.batchnorm == "measured")
