"""Which layers of a model are divided, and how: by patterns of names, or found by running the model."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from distrain.errors import ConfigError, config_error
from distrain.models.layers import unmatched
from distrain.strategies.pipeline.calls import Untraceable
from distrain.strategies.pipeline.traced_model import recorded_passes
from distrain.strategies.precision import Precision
from distrain.strategies.tensor_parallel.flow import divisible
from distrain.strategies.tensor_parallel.layers import WEIGHT_LAYERS, Division, Role, blocks_of, why_not
from distrain.strategies.tensor_parallel.options import REPLICATED, TensorParallelConfig

#: Most names of layers in a line of the log.
_SHOWN_NAMES = 4


def check_patterns(options: TensorParallelConfig, model: nn.Module) -> None:
    """Refuses a plan that doesn't fit the model, as far as that is known without running it.

    Raises:
        ConfigError: A pattern fits no module, or one that can't be divided so.
    """
    named = _named(options, model)
    for pattern, role in options.plan.items():
        names = [name for name, (first, _) in named.items() if first == pattern]
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in model.named_modules()):
            names = [name for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)]
            raise unmatched("strategy.plan", pattern, "fits no layer", names)
        for name in names if role != REPLICATED else ():
            module = model.get_submodule(name)
            if problem := why_not(module, cast(Role, role)) or _shared(model, name):
                raise ConfigError(f"strategy.plan.{pattern}", role, f"{name} {problem}")


def _shared(model: nn.Module, name: str) -> str:
    """Why a module's parameters are not its own; empty if they are."""
    owners: dict[int, list[str]] = {}
    for each, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(each)
    shared = [names for names in owners.values() if len(names) > 1]
    own = [names for names in shared if any(each.startswith(f"{name}.") for each in names)]
    return f"shares a parameter: {' and '.join(own[0])} are one" if own else ""


def _named(options: TensorParallelConfig, model: nn.Module) -> dict[str, tuple[str, str]]:
    """The first pattern that fits each module, and its role, by the module's name."""
    found: dict[str, tuple[str, str]] = {}
    for name, _ in model.named_modules():
        for pattern, role in options.plan.items():
            if name and fnmatch.fnmatchcase(name, pattern):
                found.setdefault(name, (pattern, role))
    return found


def find_divisions(
    model: nn.Module,
    example: Tensor,
    precision: Precision,
    options: TensorParallelConfig,
    ranks: int,
    *,
    auxiliary: bool,
    together: Callable[[Collection[str]], bool] = lambda names: True,
) -> dict[str, Division]:
    """How each divided module is divided, by its name; the same on all ranks.

    Args:
        model: The whole model.
        example: Inputs ``[N, …]``.
        precision: Of forward passes.
        options: The strategy's keys.
        ranks: Among which layers are divided.
        auxiliary: Whether the loss depends on auxiliary heads.
        together: Whether layers of these names may be divided together, so that what flows between them is divided;
            not asked about layers that the plan names.

    Raises:
        ConfigError: No layer can be divided, or one that the plan names can't be among so many ranks.
    """
    named = _named(options, model)
    if not options.is_automatic:
        return _planned(model, named, ranks)
    # What is replicated is so with all that it contains.
    kept = frozenset(
        name for name, _ in model.named_modules() if any(f"{name}.".startswith(f"{each}.") for each in named)
    )
    try:
        with whole_encoder_layers():
            traces = recorded_passes(model, example, precision, auxiliary=auxiliary)
    except Untraceable as error:
        place = error.place and f" at {error.place}"
        problem = f"{type(model).__name__} can't be traced: {error.problem}{place}; name the layers to divide"
        raise config_error("strategy.plan", problem) from error
    divisions = divisible(model, list(traces), kept, ranks, together)
    if not divisions:
        problem = f"no layer of {type(model).__name__} was found that {max(ranks, 2)} ranks can divide"
        raise config_error("strategy.plan", f"{problem}; name layers, or use another strategy")
    return divisions


def _planned(model: nn.Module, named: Mapping[str, tuple[str, str]], ranks: int) -> dict[str, Division]:
    """The layers that a plan names."""
    found: dict[str, Division] = {}
    for name, (pattern, role) in named.items():
        module = model.get_submodule(name)
        if role == REPLICATED:
            continue
        blocks = blocks_of(module, cast(Role, role))
        if blocks < ranks:
            problem = f"{name} can be divided into {blocks}, not among {ranks} ranks"
            raise ConfigError(f"strategy.plan.{pattern}", role, problem)
        found[name] = Division(cast(Role, role), blocks)
    return found


@contextlib.contextmanager
def whole_encoder_layers() -> Iterator[None]:
    """In this block torch's encoder layers call their submodules in evaluation too, and don't read their weights."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def whole_layers(model: nn.Module, divisions: Mapping[str, Division]) -> dict[str, int]:
    """The modules whose own parameters stay whole on each rank, and how many numbers those are.

    Called before the model is divided. The model's own parameters, which have no module, are named after its class.
    """
    inside = tuple(f"{name}." for name, division in divisions.items() if division.role == "attention")
    whole = {name: size for name, size in _layers(model).items() if name not in divisions}
    return {name or type(model).__name__: size for name, size in whole.items() if not name.startswith(inside)}


def _layers(model: nn.Module) -> dict[str, int]:
    """Each module with parameters of its own by name, and how many numbers they have."""
    sizes = {
        name: [each.numel() for each in module.parameters(recurse=False)] for name, module in model.named_modules()
    }
    return {name: sum(found) for name, found in sizes.items() if found}


def describe(model: nn.Module, divisions: Mapping[str, Division], ranks: int) -> str:
    """What is divided and what stays whole, in a line; called before the model is divided."""
    layers, whole = _layers(model), whole_layers(model, divisions)
    size = sum(parameter.numel() for parameter in model.parameters())
    share = f"{len(layers) - len(whole)} of {len(layers)} layers, with {1 - sum(whole.values()) / size:.0%}"
    named = list(whole)[:_SHOWN_NAMES] or ["nothing"]
    more = f" and {len(whole) - _SHOWN_NAMES} more" if len(whole) > _SHOWN_NAMES else ""
    return (
        f"{ranks} ranks divide {share} of the parameters, and run the same batches; "
        f"whole on each rank: {', '.join(named)}{more}"
    )
