"""How a key of the configuration is declared: its type, limits, meaning and effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import field
from typing import Any, Literal

#: What a key affects, as far as resuming and reporting a run need to know it.
#:
#: - ``sample_order``: which samples an epoch has, and their order; must not change in the middle of an epoch.
#: - ``schedule``: the learning rate at a step.
#: - ``start``: only the initial parameters, so a resumed run takes no notice of it.
#: - ``execution``: only how the run is executed and recorded, not what is trained; the key is no hyper-parameter.
#: - ``identity``: only which run this is and what it resumes; no hyper-parameter, and a change needs no message.
Effect = Literal["sample_order", "schedule", "start", "execution", "identity"]


def setting(
    doc: str,
    *,
    choices: Iterable[Any] = (),
    words: Iterable[str] = (),
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices_of: str | None = None,
    affects: Iterable[Effect] = (),
    path: bool = False,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
) -> Any:
    """Returns a dataclass field with a meaning and limits. The limits of a list apply to each of its elements.

    Args:
        doc: What the key means, with its unit; shown to users.
        choices: The allowed values; empty if they can't be listed.
        words: What may stand in place of a number.
        above: Exclusive lower limit.
        at_least: Inclusive lower limit.
        below: Exclusive upper limit.
        at_most: Inclusive upper limit.
        choices_of: A group. The field is a mapping from names to choices of this group, each checked by its own schema.
        affects: See :data:`Effect`.
        path: The value is a path, or a list of paths; a ``~`` at its beginning becomes the user's home folder.
        default: Value if the YAML file has none; normally the YAML files contain all values.
        default_factory: Makes the default, for mutable values.
    """
    metadata = {
        "doc": doc,
        "choices": tuple(choices),
        "words": tuple(words),
        "above": above,
        "at_least": at_least,
        "below": below,
        "at_most": at_most,
        "choices_of": choices_of,
        "affects": frozenset(affects),
        "path": path,
    }
    if default_factory is not dataclasses.MISSING:
        return field(metadata=metadata, default_factory=default_factory)
    return field(metadata=metadata, default="???" if default is dataclasses.MISSING else default)


def section_affects(effect: Effect) -> dict[str, frozenset[Effect]]:
    """Metadata of a field of :class:`Config` for a section or group: all its keys have this effect."""
    return {"affects": frozenset((effect,))}


def setting_of(schema: type[Any], key: str) -> Any:
    """Returns a dataclass field with the meaning, limits and default of a key of another schema.

    Args:
        schema: The dataclass that has the key.
        key: Its name.
    """
    found = next(spec for spec in dataclasses.fields(schema) if spec.name == key)
    if found.default_factory is not dataclasses.MISSING:
        return field(metadata=found.metadata, default_factory=found.default_factory)
    return field(metadata=found.metadata, default=found.default)
