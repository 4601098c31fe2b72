"""Which array of a file is what: by its name, as programs and published data sets name them, or as the user says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from distrain.data.image_tree import PART_NAMES
from distrain.errors import ConfigError, config_error

#: Words for images and for targets in the names of arrays, in lower case.
_WORDS = {
    "images": ("x", "image", "images", "img", "imgs", "input", "inputs", "data"),
    "labels": ("y", "label", "labels", "target", "targets", "mask", "masks"),
}
#: Names that ``numpy.savez`` gives to arrays without a name; they are told apart if there are just two.
_NAMELESS = {"arr_0": "images", "arr_1": "labels"}
#: What an array may be.
ROLES = tuple(f"{part}_{content}" for part in PART_NAMES for content in _WORDS)


def assign_roles(names: Iterable[str], chosen: Mapping[str, str]) -> dict[str, str]:
    """Finds the arrays of each part.

    Args:
        names: Names of all arrays.
        chosen: ``data.arrays``: names by role, where the user says them.

    Returns:
        The name of the array in each role, of :data:`ROLES`; without those that are missing.

    Raises:
        ConfigError: There are no images or no targets to train on, a name that was said doesn't exist, or two names
            mean the same.
    """
    names = list(names)
    for role, name in chosen.items():
        if role not in ROLES:
            raise config_error(f"data.arrays.{role}", "no such role of an array", ROLES)
        if name not in names:
            raise ConfigError(f"data.arrays.{role}", name, "there is no such array", names)
    roles = dict(chosen)
    meanings: dict[str, str | None] = {name: _role_of(name) for name in names}
    if set(names) == set(_NAMELESS):
        meanings = {name: f"train_{content}" for name, content in _NAMELESS.items()}
    for name, meant in meanings.items():
        if meant is None or meant in chosen or name in chosen.values():
            continue
        if meant in roles:
            problem = f"both {roles[meant]} and {name} could be it; data.arrays.{meant}=… says which one is"
            raise config_error(f"data.arrays.{meant}", problem)
        roles[meant] = name
    for role in ROLES:
        partner = role.replace("images", "labels") if "images" in role else role.replace("labels", "images")
        if role not in roles and (role.startswith("train") or partner in roles):
            raise config_error(
                f"data.arrays.{role}",
                f"which array is it? There are {', '.join(names)}; names such as x_train, y_train, train_images or "
                "train_labels are known",
            )
    return roles


def _role_of(name: str) -> str | None:
    """The role that a name means: ``X``, ``y_train``, ``train_images``, ``valid.labels``."""
    words = name.lower().replace("-", "_").replace(".", "_").split("_")
    contents = {content for content, known in _WORDS.items() for word in words if word in known}
    parts = {part for part, known in PART_NAMES.items() for word in words if word in known}
    if len(contents) != 1 or len(words) != 1 + len(parts) or len(parts) > 1:
        return None
    return f"{next(iter(parts), 'train')}_{next(iter(contents))}"
