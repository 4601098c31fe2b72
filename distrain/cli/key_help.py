"""``--help KEY``: what a key means, its type, limits and value; ``--help GROUP``: a table of its keys."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distrain.config.key_search import similar_keys
from distrain.config.load import LIMITS, describe_type
from distrain.config.registry import GROUPS, choice
from distrain.errors import config_error, show_value

#: Narrowest and widest lines, in characters.
_WIDTHS = (80, 120)
#: What is shown as the value of a key that has no default.
NEEDED = "needed"


@dataclass(frozen=True)
class Key:
    """One key as help shows it.

    Attributes:
        name: The dotted key.
        value: Its value as one would type it.
        kind: Its type, limits and choices in words.
        doc: What it means.
    """

    name: str
    value: str
    kind: str
    doc: str


def explain(name: str, schema: type[Any], composed: DictConfig, choices: Mapping[str, Sequence[str]]) -> str:
    """The explanation of a key, or a table of all keys of a group or section.

    Args:
        name: What the user asks about: ``optimizer.lr``, ``optimizer``, or only ``lr``.
        schema: The command's keys.
        composed: The command's configuration; its values are shown, and its choices determine the keys.
        choices: The names of all choices of each group.

    Raises:
        ConfigError: There is no such key.
    """
    keys = {key.name: key for key in keys_of(schema, composed, only=name)}
    if name in keys:
        return _paragraph(keys[name])
    below = [key for key in keys.values() if key.name.startswith(f"{name}.")]
    if below:
        return _title(name, composed, choices) + _table(below)
    keys = {key.name: key for key in keys_of(schema, composed)}
    docs = {key: found.doc for key, found in keys.items()}
    meant = similar_keys(name, docs)
    same = [key for key in meant if key.rpartition(".")[2] == name]
    if not same:
        tops = list(dict.fromkeys(key.partition(".")[0] for key in keys))
        raise config_error(name, "no such key", tops, meant=meant)
    return "\n".join(_paragraph(keys[key]) for key in same)


def keys_of(schema: type[Any], node: Any, prefix: str = "", only: str = "") -> Iterator[Key]:
    """The keys of a schema with the values of a configuration.

    Args:
        schema: A dataclass; each of its fields that is a group has the schema of the chosen choice.
        node: The configuration at ``prefix``.
        prefix: Where the schema is found, with a dot at its end.
        only: Looks only at the part of the configuration that holds this key; looking at a group imports its choice.
    """
    types = typing.get_type_hints(schema)
    for spec in dataclasses.fields(schema):
        if only and spec.name != only.partition(".")[0]:
            continue
        kind, here = types[spec.name], f"{prefix}{spec.name}"
        value = None if OmegaConf.is_missing(node, spec.name) else node.get(spec.name)
        if not prefix and spec.name in GROUPS:
            kind = choice(spec.name, value.get("name")).schema if isinstance(value, DictConfig) else kind
        if dataclasses.is_dataclass(kind) and isinstance(value, DictConfig):
            yield from keys_of(typing.cast(type[Any], kind), value, f"{here}.")
        else:
            shown = NEEDED if OmegaConf.is_missing(node, spec.name) else _show(value)
            yield Key(here, shown, _describe(kind, spec.metadata), spec.metadata.get("doc", ""))


def _show(value: Any) -> str:
    return str(OmegaConf.to_container(value)) if OmegaConf.is_config(value) else show_value(value)


def _describe(kind: Any, metadata: Mapping[str, Any]) -> str:
    if metadata.get("choices"):
        return "one of: " + ", ".join(map(show_value, metadata["choices"]))
    limits = [f"{words} {metadata[name]}" for name, (_, words) in LIMITS.items() if metadata.get(name) is not None]
    # "null" stands behind the limits, which don't apply to it.
    words, comma, null = describe_type(kind).partition(", or null")
    if metadata.get("path"):
        words = "a path" if kind is not Any else "a path, or a list of paths"
    named = metadata.get("words", ())
    # The words are the only text that is allowed.
    words = words.removesuffix(" or text") if named else words
    described = " ".join([words, " and ".join(limits)]).strip() + comma + null
    return described + (f", or one of: {', '.join(named)}" if named else "")


def _title(name: str, composed: DictConfig, choices: Mapping[str, Sequence[str]]) -> str:
    if name not in choices:
        return ""
    chosen = OmegaConf.select(composed, f"{name}.name")
    others = ", ".join(choices[name])
    return f"{name}={chosen}; choices: {others}\n(the keys of another: --help {name} {name}=NAME)\n\n"


def _paragraph(key: Key) -> str:
    body = textwrap.fill(key.doc, _width() - 4, initial_indent="    ", subsequent_indent="    ")
    return f"{key.name}={key.value}\n{body}\n    {key.kind}\n"


def _table(keys: Sequence[Key]) -> str:
    rows = [("key=value", "type", "meaning"), *((f"{key.name}={key.value}", key.kind, key.doc) for key in keys)]
    first = min(max(len(row[0]) for row in rows), 36)
    second = min(max(len(row[1]) for row in rows), 24)
    third = _width() - first - second - 4
    lines = []
    for row in rows:
        cells = [textwrap.wrap(text, width) or [""] for text, width in zip(row, (first, second, third), strict=True)]
        for number in range(max(map(len, cells))):
            texts = [cell[number] if number < len(cell) else "" for cell in cells]
            lines.append(f"{texts[0]:{first}}  {texts[1]:{second}}  {texts[2]}".rstrip())
    return "\n".join(lines) + "\n"


def _width() -> int:
    return max(_WIDTHS[0], min(shutil.get_terminal_size().columns, _WIDTHS[1]))
