"""Finds the keys that somebody may have meant who typed one that does not exist."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

#: Most keys that a message suggests.
_MOST = 3


def schema_docs(schema: type[Any], prefix: str = "") -> dict[str, str]:
    """The meaning of each key of a schema, at any depth, by dotted key."""
    return {key: spec.metadata["doc"] for key, spec in schema_fields(schema, prefix) if "doc" in spec.metadata}


def schema_fields(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """The fields of a schema that hold values, at any depth, with their dotted keys."""
    types = typing.get_type_hints(schema)
    for spec in dataclasses.fields(schema):
        if dataclasses.is_dataclass(types[spec.name]):
            yield from schema_fields(types[spec.name], f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", spec


def same_name(key: str, known: Iterable[str]) -> list[str]:
    """Those of some dotted keys whose last part is that of another key."""
    name = _last_part(key).lower()
    return [found for found in known if _last_part(found) == name][:_MOST]


def similar_keys(key: str, docs: Mapping[str, str]) -> list[str]:
    """The keys that are most like one that does not exist.

    Those with the same last part come first; else the one whose meaning begins with the words of the key
    (``learning_rate``: "Base learning rate …"); else those whose last part is spelt almost like that.

    Args:
        key: What was typed, such as ``lr`` or ``trainer.lr``.
        docs: All keys that there are, dotted, with their meaning as far as it is known.
    """
    same = same_name(key, docs)
    if same:
        return same
    name = _last_part(key).lower()
    words = name.replace("_", " ")
    places = {known: doc.lower().find(words) for known, doc in docs.items()}
    named = sorted((place, known) for known, place in places.items() if place >= 0)
    if " " in words and named:
        return [named[0][1]]
    close = difflib.get_close_matches(name, dict.fromkeys(map(_last_part, docs)), n=1, cutoff=0.7)
    return [known for known in docs if _last_part(known) in close][:_MOST]


def _last_part(key: str) -> str:
    return key.rpartition(".")[2]
