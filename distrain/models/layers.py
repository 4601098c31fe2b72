"""A model's layers in order, and which of its parameters a pattern names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from distrain.errors import ConfigError

#: The pattern that stands for the parameters of a model's last layer.
HEAD = "head"

#: Names shown in a message.
_SHOWN = 6
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layer_depths(model: nn.Module) -> dict[str, int]:
    """The layer that each parameter belongs to, counted from 0 in the order in which the model lists its modules.

    A layer is a child module. A container (``nn.Sequential``, ``nn.ModuleList``, ``nn.ModuleDict``), and any module
    that holds a row of modules of one class, is not a layer but is made of the layers in it. A module with vectors
    alone, such as a normalisation, belongs to the layer before it. Parameters beside layers (a class token) belong to
    the next layer.

    Args:
        model: The unsplit model.
    """
    depths: dict[str, int] = {}
    depth = -1
    waiting: list[str] = []
    for parameters, are_beside_layers in _layers(model, ""):
        only_vectors = all(parameter.dim() <= 1 for parameter in parameters.values())
        if are_beside_layers or (only_vectors and depth < 0):
            waiting += parameters
        elif only_vectors:
            depths |= dict.fromkeys(parameters, depth)
        else:
            depth += 1
            depths |= dict.fromkeys([*waiting, *parameters], depth)
            waiting = []
    return depths | dict.fromkeys(waiting, max(depth, 0))


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are layers in the sense of :func:`layer_depths`, by name, also those without parameters."""
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if _is_made_of_layers(child):
                visit(child, path)
            else:
                found[path] = child

    visit(model, "")
    return found


def _layers(module: nn.Module, prefix: str) -> Iterator[tuple[dict[str, nn.Parameter], bool]]:
    """The parameters of each layer by name, and of what is beside layers, for which the second value is true."""
    own = dict(module.named_parameters(prefix, recurse=False))
    if own:
        yield own, True
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if _is_made_of_layers(child):
            yield from _layers(child, path)
        elif parameters := dict(child.named_parameters(path)):
            yield parameters, False


def _is_made_of_layers(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS) or any(map(_is_row, module.modules()))


def _is_row(module: nn.Module) -> bool:
    """Whether a module is a container of several modules of one class with parameters."""
    children = list(module.children())
    same = len(children) > 1 and len({type(child) for child in children}) == 1
    return isinstance(module, _CONTAINERS) and same and any(True for _ in children[0].parameters())


def matches(pattern: str, name: str, depths: Mapping[str, int]) -> bool:
    """Whether a pattern names a parameter.

    Args:
        pattern: A shell pattern of names, or ``head``: the parameters of the last layer.
        name: The parameter's name.
        depths: Result of :func:`layer_depths` for the whole model.
    """
    if pattern == HEAD:
        return depths.get(name) == max(depths.values(), default=None)
    return fnmatch.fnmatchcase(name, pattern)


def unmatched(key: str, pattern: str, problem: str, names: Sequence[str]) -> ConfigError:
    """The error for a pattern that names no parameter.

    Args:
        key: Where the pattern is.
        pattern: The pattern.
        problem: What is wrong with it.
        names: The names that it might have meant; the nearest ones, or patterns of all parameters of a module, are
            suggested.
    """
    modules = {f"{name[:end]}.*" for name in names for end, letter in enumerate(name) if letter == "."}
    near = difflib.get_close_matches(pattern, [*modules, *names], n=2, cutoff=0.5)
    listed = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return ConfigError(key, pattern, f"{problem}; they are {listed}", meant=near)
