"""Initial parameters from another model: which file they are in, which tensors fit, and what stays new."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distrain.checkpoint import hub_weights, safetensors_writer, weight_files
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.communication.collectives import digest
from distrain.config.schema import InitConfig
from distrain.errors import ConfigError, described
from distrain.models import lora, pruning
from distrain.runtime.runtime import Runtime
from distrain.torch_internals import storage_id

log = logging.getLogger(__name__)

#: What wrappers of a model put before all names: DistributedDataParallel and torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
#: Most names of each kind that the log shows.
_MOST_NAMES = 12


@dataclass(frozen=True)
class Match:
    """Which of a model's tensors a file holds.

    Attributes:
        tensors: What the file holds for the model, by the model's names.
        new: Names of the model's tensors that keep their random initial values, and why.
        left_over: Names in the file that the model has no tensor for, as they are after renaming.
    """

    tensors: dict[str, Tensor]
    new: dict[str, str]
    left_over: list[str]

    def describe(self, source: str) -> list[str]:
        """What was loaded, what is new and what was left over, in some lines.

        Args:
            source: Where the tensors come from.
        """
        total = len(self.tensors) + len(self.new)
        values = sum(tensor.numel() for tensor in self.tensors.values())
        lines = [
            f"initial weights from {source}: {len(self.tensors)} of the model's {total} tensors, {values:,} values"
        ]
        lines += [f"  new ({why}): {_listed(names)}" for why, names in _by_reason(self.new).items()]
        lines += [f"  left over, not in the model: {_listed(self.left_over)}"] if self.left_over else []
        return lines


def check(config: InitConfig, model: nn.Module) -> None:
    """Refuses weights that can't be read, that don't fit the model at all, or that are not finite.

    Args:
        config: The section ``init``.
        model: A model with this run's names and shapes; its values don't matter, and it is not changed.

    Raises:
        ConfigError: One line that names the file, or the first names of both sides.
    """
    if config.weights is None:
        return
    for name, tensor in _match(config, config.weights, model).tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _refused(config, f"{name} has values that are NaN or infinite")


def load(config: InitConfig, runtime: Runtime, model: nn.Module) -> None:
    """Gives a model the weights that ``init.weights`` names; all ranks call it together.

    A tensor is loaded if the model has one of the same name and shape. It is converted to the model's number format.

    Args:
        config: The section ``init``; does nothing if it names no weights.
        runtime: This rank's surroundings.
        model: Gets the weights; its other tensors stay as they are.

    Raises:
        ConfigError: As :func:`check`; or the ranks have different files.
    """
    if config.weights is None:
        return
    found = _match(config, config.weights, model)
    _refuse_if_ranks_differ(config, runtime, found)
    try:
        model.load_state_dict(found.tensors, strict=False)
    except Exception as error:  # a load hook of the user's may raise anything
        raise _refused(config, f"the model can't load them {described(error)}") from error
    if runtime.is_main:
        for line in found.describe(config.weights):
            log.info("%s", line)


def _refuse_if_ranks_differ(config: InitConfig, runtime: Runtime, found: Match) -> None:
    names = "\n".join(found.tensors).encode()
    own = digest([torch.frombuffer(bytearray(names), dtype=torch.uint8), *found.tensors.values()])
    report = {"digest": int(own), "host": runtime.world.host}
    ranks = runtime.communicator().all_gather_json(report, runtime.device)
    for rank, other in enumerate(ranks):
        if other["digest"] != ranks[0]["digest"]:
            where = (
                f"rank {rank} on {other['host']} has other weights under this name than rank 0 on {ranks[0]['host']}"
            )
            raise _refused(config, f"{where}; copy the same file to both hosts")


def _match(config: InitConfig, source: str, model: nn.Module) -> Match:
    """Reads the file and compares it with the model.

    Raises:
        ConfigError: As :func:`check`.
    """
    try:
        path = hub_weights.download(source) if source.startswith(hub_weights.PREFIX) else Path(source)
        saved = _without_wrappers(weight_files.read(path))
        # Of a pruned run; its masks stay for a model that is pruned too.
        saved |= pruning.merged(saved)
    except (DamagedCheckpoint, OSError) as error:
        raise _refused(config, str(error)) from error
    renamed: dict[str, Tensor] = {}
    for name, tensor in saved.items():
        new_name = _renamed(config, name)
        if new_name in renamed:
            raise ConfigError("init.rename", config.rename, f"gives two tensors the name {new_name!r}")
        renamed[new_name] = tensor
    lora.refuse_unmerged(renamed, model, source)
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    own, renamed = pruning.without_other_masks(own, renamed), pruning.without_other_masks(renamed, own)
    for pattern in config.exclude:
        if not fnmatch.filter([*own, *renamed], pattern):
            raise ConfigError("init.exclude", pattern, f"matches no name; the model has {_listed(list(own))}")
    tensors: dict[str, Tensor] = {}
    new: dict[str, str] = {}
    for name, value in own.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.exclude):
            new[name] = "excluded"
        elif name not in renamed:
            new[name] = "not in the file"
        elif problem := safetensors_writer.why_unsupported(renamed[name]):
            new[name] = f"the file has {problem}"
        elif renamed[name].shape != value.shape:
            new[name] = f"{list(value.shape)}, the file has {list(renamed[name].shape)}"
        else:
            tensors[name] = renamed[name]
    # Of parameters that share their memory, files often hold one alone.
    loaded = {_place_in_memory(own[name]) for name in tensors}
    new = {name: why for name, why in new.items() if _place_in_memory(own[name]) not in loaded}
    # A counter, such as BatchNorm's num_batches_tracked, fits any model.
    if not any(tensor.is_floating_point() for tensor in tensors.values()):
        raise _refused(config, _why_nothing_fits(list(own), list(renamed), new))
    return Match(tensors, new, [name for name in renamed if name not in own])


def _place_in_memory(tensor: Tensor) -> tuple[int, int, torch.Size]:
    return storage_id(tensor), int(tensor.storage_offset()), tensor.shape


def _why_nothing_fits(own: Sequence[str], saved: Sequence[str], new: Mapping[str, str]) -> str:
    same = [name for name in own if name in saved and name in new]
    if same:
        return f"no tensor fits the model: {same[0]} is {new[same[0]]}"
    there, here = (_listed(names, most=3) for names in (saved, own))
    problem = f"has no tensor of the model: it has {there}; the model has {here}"
    prefix = _common_prefix_to_remove(own, saved)
    if prefix:
        return f'{problem}; type \'init.rename=[["^{re.escape(prefix)}",""]]\''
    return f"{problem}; init.rename=[[PATTERN,REPLACEMENT]] changes the names of the file"


def _common_prefix_to_remove(own: Collection[str], saved: Sequence[str]) -> str:
    """What to remove from the beginning of saved names so that the model has most of them; empty if nothing does."""
    counts: dict[str, int] = {}
    for name in saved:
        parts = name.split(".")
        for count in range(1, len(parts)):
            if ".".join(parts[count:]) in own:
                prefix = ".".join(parts[:count]) + "."
                counts[prefix] = counts.get(prefix, 0) + 1
    best = max(counts, key=lambda prefix: counts[prefix], default="")
    return best if best and 2 * counts[best] >= len(own) else ""


def _renamed(config: InitConfig, name: str) -> str:
    for pair in config.rename:
        try:
            pattern, replacement = pair
            name = re.sub(pattern, replacement, name)
        except (ValueError, re.error, IndexError) as error:
            problem = f"is not a pair of a regular expression and its replacement ({error})"
            raise ConfigError("init.rename", pair, problem) from error
    return name


def _without_wrappers(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in saved):
            saved = {name.removeprefix(prefix): tensor for name, tensor in saved.items()}
    return saved


def _by_reason(new: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, why in new.items():
        reasons.setdefault(why, []).append(name)
    return reasons


def _listed(names: Sequence[str], most: int = _MOST_NAMES) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _refused(config: InitConfig, problem: str) -> ConfigError:
    return ConfigError("init.weights", config.weights, problem)
