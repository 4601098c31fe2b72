"""Which of a model's parameters are trained in which epoch, and which modules keep still because theirs are not."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence, Set

from torch import nn

from distrain.config.schema import Config, FreezeConfig
from distrain.errors import ConfigError, config_error
from distrain.models import lora
from distrain.models.layers import layer_depths, matches, unmatched

#: Most names of frozen parameters in a line of the log.
_SHOWN_NAMES = 4


def freeze_schedule(config: Config, model: nn.Module) -> FreezeSchedule | None:
    """When each parameter is trained, by ``freeze`` and ``lora``; ``None`` if all always are.

    Args:
        config: Of the run.
        model: The unsplit model, with the matrices of LoRA.

    Raises:
        ConfigError: See :class:`FreezeSchedule`; or a pattern of ``lora.also_train`` names no parameter.
    """
    frozen = lora.frozen(config.lora, model)
    return FreezeSchedule(config.freeze, model, frozen) if config.freeze or frozen else None


class FreezeSchedule:
    """When each parameter of a model is trained.

    Args:
        config: The key ``freeze``; for a parameter the first entry counts whose pattern matches its name.
        model: The unsplit model. Parameters that it does not want to be trained are ignored.
        frozen: Names of parameters that are never trained, whatever the entries say.

    Raises:
        ConfigError: A pattern matches no parameter that is trained without it, or nothing is left to train in an epoch.
    """

    def __init__(self, config: Sequence[FreezeConfig], model: nn.Module, frozen: Collection[str] = ()) -> None:
        wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        names = [name for name in wanted if name not in frozen]
        depths = layer_depths(model) if config else {}
        #: The first epoch in which each parameter is trained; infinite for never.
        self._first_epoch: dict[str, float] = dict.fromkeys(names, 0)
        used: set[int] = set()
        for name in names:
            for index, entry in enumerate(config):
                if matches(entry.match, name, depths):
                    used.add(index)
                    self._first_epoch[name] = math.inf if entry.epochs is None else entry.epochs
                    break
        for index, entry in enumerate(config):
            if index not in used:
                problem = "matches none of the parameters that would be trained and are in no earlier entry"
                left = [name for name in names if not any(matches(each.match, name, depths) for each in config[:index])]
                raise unmatched(f"freeze[{index}].match", entry.match, problem, left)
        first = min(self._first_epoch.values(), default=0)
        if first:
            when = "" if first == math.inf else f" in the first {first:g} epochs"
            way_out = "an entry before the others with epochs: 0, such as {match: head, epochs: 0}, is never frozen"
            raise config_error("freeze", f"leaves no parameter to train{when}; {way_out}")
        self._first_epoch |= {name: math.inf for name in wanted if name in frozen}

    @property
    def parameters(self) -> Set[str]:
        """Names of all parameters that would be trained if nothing was frozen."""
        return self._first_epoch.keys()

    @property
    def epochs(self) -> list[int]:
        """The epochs that train more than the one before, in order; the first is 0."""
        return sorted({int(epoch) for epoch in self._first_epoch.values() if epoch < math.inf} | {0})

    def described(self, epoch: int) -> str:
        """How many parameter tensors are trained in an epoch, and the names of some that are not."""
        trained = self.trained(epoch)
        frozen = [name for name in self.parameters if name not in trained]
        shown = ", ".join(frozen[:_SHOWN_NAMES]) + (" …" if len(frozen) > _SHOWN_NAMES else "")
        of_all = f"{len(trained)} of {len(self.parameters)} parameter tensors are trained"
        return f"{of_all}, frozen: {shown}" if frozen else of_all

    @property
    def ever_trained(self) -> frozenset[str]:
        """Names of the parameters that are trained in some epoch."""
        return frozenset(name for name, epoch in self._first_epoch.items() if epoch < math.inf)

    def trained(self, epoch: int) -> frozenset[str]:
        """Names of the parameters that are trained in an epoch, counted from 0."""
        return frozenset(name for name, first in self._first_epoch.items() if first <= epoch)


def check_counts(config: Config) -> None:
    """Refuses to freeze for some epochs together with what counts the updates of parameters.

    A rank that holds frozen parameters alone makes no update, so its count would be behind that of others.

    Raises:
        ConfigError: Names the key that counts.
    """
    if not any(entry.epochs for entry in config.freeze):
        return
    problem = "counts updates, which a rank whose parameters are frozen for some epochs (freeze) doesn't make"
    if config.optimizer.lookahead.every is not None:
        raise ConfigError("optimizer.lookahead.every", config.optimizer.lookahead.every, problem, ["null"])
    for index, group in enumerate(config.optimizer.groups):
        if group.epochs is not None:
            raise ConfigError(f"optimizer.groups[{index}].epochs", group.epochs, problem, ["null"])


def train_only(model: nn.Module, trained: Collection[str], among: Collection[str]) -> None:
    """Lets some parameters require a gradient and others not.

    Args:
        model: The model, or a part of it with the same names.
        trained: Names of those that do.
        among: Names of all that this decides about; the others stay as they are.
    """
    for name, parameter in model.named_parameters():
        if name in among:
            parameter.requires_grad_(name in trained)


def ever_still(freezing: FreezeSchedule | None, model: nn.Module) -> frozenset[str]:
    """Names of the modules that keep still in some epoch; see :func:`still_modules`."""
    if freezing is None:
        return frozenset()
    frozen = [freezing.parameters - freezing.trained(epoch) for epoch in freezing.epochs]
    return frozenset(name for names in frozen for name in still_modules(model, names))


def still_modules(model: nn.Module, frozen: Collection[str]) -> list[str]:
    """Names of the modules with parameters or buffers that keep still: all their own parameters are frozen.

    In evaluation mode they don't update running statistics (BatchNorm) and normalise by them. A module with buffers
    alone keeps still if the smallest part of the model around it that has parameters is frozen as a whole.

    Args:
        model: The unsplit model. It is not among the result itself.
        frozen: Names of the frozen parameters.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def is_frozen(parameters: list[nn.Parameter]) -> bool:
        decided = [names[id(parameter)] in frozen for parameter in parameters if id(parameter) in names]
        return bool(decided) and all(decided)

    still = []
    around: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        around = [(prefix, parent) for prefix, parent in around if not prefix or path.startswith(f"{prefix}.")]
        parameters = list(module.parameters(recurse=False))
        if not parameters and next(module.buffers(recurse=False), None) is not None:
            enclosing = (list(parent.parameters()) for _, parent in reversed(around))
            parameters = next((found for found in enclosing if found), [])
        if path and is_frozen(parameters):
            still.append(path)
        around.append((path, module))
    return still
