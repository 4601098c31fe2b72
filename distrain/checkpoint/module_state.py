"""A model's state: read from the module and loaded through it, so that its extra state and its load hooks are honoured.

A module's ``state_dict()`` holds parameters and buffers. A module with ``get_extra_state()`` adds an entry
``<module>._extra_state``, a tensor or any other object. Tensors are saved as tensors and plain data as JSON; a model
with anything else is refused before it is trained, since a pickle would be needed to save it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from distrain import torch_internals
from distrain.checkpoint import safetensors_writer
from distrain.checkpoint.saved_tensors import JoinedTensors, SavedTensor, described
from distrain.communication.collectives import Communicator, digest
from distrain.errors import config_error

#: Last part of the name of a module's extra state, as torch names it.
_EXTRA_STATE = "_extra_state"
_PLAIN = "a tensor or plain data: numbers, text, true, false, none, lists, and dictionaries with text as keys"


@dataclass(frozen=True)
class ModuleState:
    """What a module's ``state_dict()`` holds.

    Attributes:
        tensors: Parameters, buffers, and extra state that is a tensor, by name; they are not copies.
        extra_state: Extra state that is plain data, as JSON text by name. Text, because JSON has no infinity.
        versions: ``_version`` of each module's class, by the module's name, where it is not 1. Load hooks ask for it.
    """

    tensors: dict[str, Tensor]
    extra_state: dict[str, str]
    versions: dict[str, int]

    def to_plain(self) -> dict[str, Any]:
        """All but the tensors, as plain data."""
        return {"extra_state": self.extra_state, "versions": self.versions}


def is_extra_state(name: str) -> bool:
    """Whether an entry of a ``state_dict()`` is a module's extra state."""
    return name.rpartition(".")[2] == _EXTRA_STATE


def read(module: nn.Module) -> ModuleState:
    """A module's state.

    Raises:
        ValueError: An entry is neither a tensor that a checkpoint can hold nor plain data; the message names it.
    """
    state = module.state_dict()
    tensors: dict[str, Tensor] = {}
    extra: dict[str, str] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            problem = safetensors_writer.why_unsupported(value)
            tensors[name] = value
        else:
            problem = why_not_plain(value)
            if not problem:
                extra[name] = json.dumps(value)
        if problem:
            raise ValueError(f"{_owner(module, name)} has the state {name}, {problem}; a checkpoint can hold {_PLAIN}")
    versions = {name: entry.get("version") for name, entry in torch_internals.state_metadata(state).items()}
    return ModuleState(tensors, extra, {name: v for name, v in versions.items() if isinstance(v, int) and v != 1})


def _owner(module: nn.Module, name: str) -> str:
    """Class of the module that an entry of a ``state_dict()`` belongs to."""
    try:
        return type(module.get_submodule(name.rpartition(".")[0])).__name__
    except AttributeError:  # a hook of the module named the entry
        return type(module).__name__


def why_not_plain(value: object, place: str = "") -> str:
    """Why JSON can't hold a value and give back an equal one; empty if it can."""
    # By the exact type: JSON would give back another type for a tuple or a numpy number.
    if value is None or type(value) in (bool, float, str):
        return ""
    if type(value) is int:
        # Python refuses to read a longer number.
        return "" if value.bit_length() < 8192 else f"a number of {value.bit_length()} bits{place}"
    if place.count("[") > 64:
        return "data that are nested more than 64 deep"
    if type(value) is list:
        return next(filter(None, (why_not_plain(item, f"{place}[{i}]") for i, item in enumerate(value))), "")
    if type(value) in (dict, OrderedDict):
        items = cast(dict[object, object], value).items()
        if wrong := [key for key, _ in items if type(key) is not str]:
            return f"a dictionary{place} with the key {wrong[0]!r}, which is no text"
        return next(filter(None, (why_not_plain(item, f"{place}[{key!r}]") for key, item in items)), "")
    return f"a {type(value).__name__}{place and ' at '}{place}"


def load(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any] | None = None,
    *,
    apart: Collection[str] = (),
) -> None:
    """Gives a module the state that :func:`read` returned, through the module's own ``load_state_dict()``.

    Parameters and buffers keep their memory. Tensors that are read when they are asked for are not all held at once,
    unless the module has load hooks of its own.

    Args:
        module: The module.
        tensors: :attr:`ModuleState.tensors`.
        plain: :meth:`ModuleState.to_plain`; ``None`` for a checkpoint that was saved without it.
        apart: Names of the module that are loaded in another way, and so are neither in ``tensors`` nor missing.

    Raises:
        ValueError: A name is missing or is not in the module, or a shape differs; the first few are named. Nothing is
            changed then, unless the module has load hooks of its own. Or such a hook failed.
    """
    plain = plain or {}
    extra = {name: json.loads(text) for name, text in plain.get("extra_state", {}).items()}
    own = {name: value for name, value in module.state_dict().items() if name not in apart}
    metadata = torch_internals.state_metadata(module.state_dict())
    if not torch_internals.loads_in_its_own_way(module):
        _raise_if_any(_differences(own, {**described(tensors), **extra}))
    if "versions" in plain:
        for name, entry in metadata.items():
            entry["version"] = plain["versions"].get(name, 1)
    missing: set[str] | None = None
    for portion in _portions(module, tensors, extra):
        state = OrderedDict(portion)
        torch_internals.set_state_metadata(state, metadata)
        try:
            found = module.load_state_dict(state, strict=False)
        except Exception as error:  # a hook of the user's may raise anything
            problem = f"{type(module).__name__} can't load its state ({type(error).__name__}: {error})"
            raise ValueError(problem) from error
        # A load_state_dict of the user's own may return nothing.
        absent = set(getattr(found, "missing_keys", ())).difference(apart)
        missing = absent if missing is None else missing & absent
        _raise_if_any([f"{name} is not in the model" for name in getattr(found, "unexpected_keys", ())])
    _raise_if_any([f"{name} is missing" for name in sorted(missing or ())])


def _portions(module: nn.Module, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The state in portions about as large as the largest tensor; in one if it isn't plain, or is in memory anyway."""
    if isinstance(tensors, dict) or extra or not has_plain_state(module):
        yield {**tensors, **extra}
        return
    sizes = {name: entry.shape.numel() * entry.dtype.itemsize for name, entry in described(tensors).items()}
    limit = max(sizes.values(), default=0)
    portion: dict[str, Any] = {}
    held = 0
    for name, size in sizes.items():
        if held + size > limit and portion:
            yield portion
            portion, held = {}, 0
        portion[name] = tensors[name]
        held += size
    yield portion


def has_plain_state(module: nn.Module) -> bool:
    """Whether the state of a module, and of those in it, is their parameters and buffers alone, under their names."""
    return all(torch_internals.has_plain_state(each) for each in module.modules())


def saved_as_they_are(module: nn.Module) -> list[str]:
    """Names of the parameters that are surely in the state of a module as they are; shared ones have several."""
    modules = module.named_modules(remove_duplicate=False)
    others = tuple(f"{name}." if name else "" for name, each in modules if not torch_internals.has_plain_state(each))
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return [name for name in names if not name.startswith(others)]


def check_fits(module: nn.Module, shapes: Mapping[str, torch.Size], plain: Mapping[str, Any] | None) -> None:
    """Refuses saved state that :func:`load` would refuse, as far as names and shapes tell; nothing is loaded.

    Args:
        module: The module. Its tensors may be on the meta device.
        shapes: Shape of each saved tensor by its name.
        plain: As for :func:`load`.

    Raises:
        ValueError: As from :func:`load`.
    """
    if torch_internals.loads_in_its_own_way(module):
        return
    saved: dict[str, Any] = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    saved |= (plain or {}).get("extra_state", {})
    _raise_if_any(_differences(module.state_dict(), saved))


def check_entries(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compares a module's entries with saved ones by name and shape.

    Raises:
        ValueError: They differ; the first few are named.
    """
    _raise_if_any(_differences(own, saved))


def _differences(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """How a module's entries and saved ones differ in names and shapes."""
    problems = [f"{name} is missing" for name in own if name not in saved]
    problems += [f"{name} is not in the model" for name in saved if name not in own]
    if problems:
        return problems
    shapes = [(name, _shape(saved[name]), _shape(value)) for name, value in own.items() if not is_extra_state(name)]
    return [f"{name} is {there}, the model's {here}" for name, there, here in shapes if there != here]


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor | SavedTensor) else "plain data"


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("the saved model is not this model: " + "; ".join(problems[:3]) + more)


def check_saveable(module: nn.Module) -> dict[str, torch.Size]:
    """Checks that a model's state can be saved and loaded, by loading it into the model itself.

    Call it with a model that is built for a trial only, before and after a forward pass in training mode. If the
    results differ, a forward pass adds or reshapes state, and a new model could not load it.

    Returns:
        Names and shapes of parameters and buffers.

    Raises:
        ConfigError: The state can't be saved, or not be loaded; the message names the module.
    """
    try:
        state = read(module)
    except ValueError as error:
        raise config_error("model", str(error)) from error
    except Exception as error:  # a user's get_extra_state may raise anything
        problem = f"the state of {type(module).__name__} can't be read ({type(error).__name__}: {error})"
        raise config_error("model", f"{problem}, and what can't be saved is not trained") from error
    try:
        load(module, state.tensors, state.to_plain())
    except ValueError as error:
        problem = f"{type(module).__name__} can't load the state that it saves ({error})"
        raise config_error("model", problem) from error
    return {name: tensor.shape for name, tensor in state.tensors.items() if not is_extra_state(name)}


# --- parts of a model ------------------------------------------------------------------------------------------------


def merged_plain(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The plain data of a model whose blocks are in several modules, from the plain data of these."""
    merged: dict[str, Any] = {"extra_state": {}, "versions": {}}
    for part in parts:
        for key, values in merged.items():
            values |= part[key]
    return merged


def part_of(
    names: Collection[str], tensors: Mapping[str, Tensor], plain: Mapping[str, Any] | None
) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """The arguments of :func:`load` for a part of a model, from those for the model.

    Args:
        names: Modules, parameters and buffers that the part has.
        tensors: As for :func:`load`.
        plain: As for :func:`load`.
    """
    known = set(names)

    def entries_of_part(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entries.items() if not known.isdisjoint(_beginnings(name))}

    part = None if plain is None else {key: entries_of_part(entries) for key, entries in plain.items()}
    return JoinedTensors(dict.fromkeys(entries_of_part(described(tensors)), tensors)), part


def _beginnings(name: str) -> list[str]:
    """``a.b.c`` gives ``a``, ``a.b`` and ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def check_blocks(blocks: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Compares the names of a model's blocks with those of saved tensors.

    Raises:
        ValueError: A tensor belongs to no block.
    """
    known = set(blocks)
    _raise_if_any([f"{name} is not in the model" for name in tensors if name.partition(".")[0] not in known])


# --- state that differs between ranks --------------------------------------------------------------------------------

#: Prefixes of the names under which a rank saves its own buffers and extra state; plain data as JSON text in uint8.
_OWN, _OWN_TEXT = "module", "module_text"


def own_state(module: nn.Module, state: ModuleState, replicas: Communicator, device: torch.device) -> dict[str, Tensor]:
    """What each replica must save for itself: buffers and extra state, if they differ between replicas.

    All replicas call it together.

    Args:
        module: The module.
        state: Its state.
        replicas: The ranks that hold a copy of the module.
        device: Device on which they communicate.
    """
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    own = {f"{_OWN}/{name}": tensor for name, tensor in state.tensors.items() if name not in parameters}
    for name, text in state.extra_state.items():
        own[f"{_OWN_TEXT}/{name}"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    if replicas.size == 1 or not own:
        return {}
    hashes = replicas.all_gather(digest(own.values()).to(device))
    return own if any(bool(other != hashes[0]) for other in hashes) else {}


def with_own_state(
    tensors: Mapping[str, Tensor], plain: Mapping[str, Any] | None, own: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """The arguments of :func:`load`, with what :func:`own_state` returned in place of the first replica's."""
    replaced: dict[str, Tensor] = {}
    texts = {}
    for key, tensor in own.items():
        kind, _, name = key.partition("/")
        if kind == _OWN:
            replaced[name] = tensor
        elif kind == _OWN_TEXT:
            texts[name] = bytes(tensor.tolist()).decode()
    merged = tensors
    if replaced:
        merged = JoinedTensors({**dict.fromkeys(tensors, tensors), **dict.fromkeys(replaced, replaced)})
    if not texts:
        return merged, None if plain is None else dict(plain)
    plain = plain or {}
    return merged, {**plain, "extra_state": {**plain.get("extra_state", {}), **texts}}
