"""Which tar files belong to which part of a data set: by their names, or by a pattern that the user gives."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from distrain.data.image_cache import ImageFile
from distrain.data.image_tree import PART_NAMES, part_named
from distrain.errors import ConfigError

log = logging.getLogger(__name__)
_SUFFIX = ".tar"
#: Endings of compressed tars, which are not looked for but named.
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
#: Most files that a pattern may stand for.
_MOST_SHARDS = 100_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def find_shards(root: Path, patterns: dict[str, str | None]) -> dict[str, list[ImageFile]]:
    """The shards of each part; ``train`` is always one of them.

    Args:
        root: Folder of the shards.
        patterns: For train, val and test a pattern of file names below the root, or ``None``. If all are ``None``, the
            files' names or folders say what belongs to which part; see :func:`_by_name`.

    Raises:
        ConfigError: There is no such folder or file, a part has no shards, or a file belongs to two parts.
    """
    if not root.is_dir():
        raise ConfigError("data.root", root, _no_folder(root))
    if any(patterns.values()):
        if patterns["train"] is None:
            raise ConfigError("data.train", None, "names the shards to train on, if data.val or data.test is given")
        names = {part: _matching(root, f"data.{part}", pattern) for part, pattern in patterns.items() if pattern}
    else:
        names = _by_name(root)
    used: dict[str, str] = {}
    for part, found in names.items():
        for name in found:
            if name in used:
                raise ConfigError("data.root", root, f"{name} would belong to {used[name]} and to {part}")
            used[name] = part
    return {part: [_listed(root, name) for name in found] for part, found in names.items()}


def _no_folder(root: Path) -> str:
    text = str(root)
    if re.match(r"\w+:", text):
        return "is not a folder; only local files are read: download the shards first"
    if root.is_file() or re.search(r"[{}*?]", text):
        return f"is not a folder; data.root={root.parent} data.train='\"{root.name}\"' names shards in one"
    return "is not a folder"


def _by_name(root: Path) -> dict[str, list[str]]:
    """Files ``train-*.tar``, ``val-*.tar``, ``test-*.tar``, or ``*.tar`` in folders with such names; else all train."""
    tars = [path.relative_to(root).as_posix() for path in (*root.glob(f"*{_SUFFIX}"), *root.glob(f"*/*{_SUFFIX}"))]
    found: dict[str, list[str]] = {}
    others = []
    for name in sorted(name for name in tars if not any(part.startswith(".") for part in PurePosixPath(name).parts)):
        part = _part_of(name)
        if part is None:
            others.append(name)
        else:
            found.setdefault(part, []).append(name)
    if "train" in found:
        if others:
            log.warning("ignoring %d tars in %s that are of no part, %s for example", len(others), root, others[0])
        return {part: found[part] for part in PART_NAMES if part in found}
    if found and not others:
        problem = f"has shards for {' and '.join(found)}, and none to train on (train-….tar); data.train names them"
        raise ConfigError("data.root", root, problem)
    if found:
        problem = f"{others[0]} may be to train on or not; name them: data.train='\"*.tar\"'"
        raise ConfigError("data.root", root, problem)
    if not others:
        for path in sorted(root.iterdir()):
            if path.name.lower().endswith(_COMPRESSED):
                problem = (
                    f"{path.name} is compressed; images are compressed already: uncompress it (gunzip {path.name})"
                )
                raise ConfigError("data.root", root, problem)
        raise ConfigError("data.root", root, "has no .tar files, directly or in train/, val/ and test/")
    return {"train": others}


def _part_of(name: str) -> str | None:
    path = PurePosixPath(name)
    first = path.parts[0] if len(path.parts) > 1 else re.split(r"[^a-zA-Z]", path.name)[0]
    return part_named(first)


def _matching(root: Path, key: str, pattern: str) -> list[str]:
    """Names of the files that a pattern stands for, relative to the root."""
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts or re.match(r"\w+:", pattern):
        raise ConfigError(key, pattern, f"is a pattern of files in data.root ({root}), such as train-{{000..127}}.tar")
    names: list[str] = []
    for name in _braces(key, pattern):
        if re.search(r"[*?\[]", name):
            matching = sorted(path.relative_to(root).as_posix() for path in root.glob(name) if path.is_file())
            if not matching:
                raise ConfigError(key, pattern, f"no file in {root} matches {name}")
            names += matching
        else:
            names.append(name)
        if len(names) > _MOST_SHARDS:
            raise ConfigError(key, pattern, f"stands for more than {_MOST_SHARDS:,} files")
    if missing := [name for name in names if not (root / name).is_file()]:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ConfigError(key, pattern, f"{missing[0]}{more} not in {root}")
    return list(dict.fromkeys(names))


def _braces(key: str, pattern: str) -> Iterator[str]:
    """Expands ``{000..127}`` and ``{a,b}`` as a shell does, without making more than is asked for."""
    found = _RANGE.search(pattern) or _CHOICE.search(pattern)
    if found is None:
        if re.search(r"[{}]", pattern):
            raise ConfigError(key, pattern, "braces hold a range or a list: {000..127} or {a,b}")
        yield pattern
        return
    head, tail = pattern[: found.start()], pattern[found.end() :]
    if found.re is _RANGE:
        first, last = found.groups()
        if int(last) < int(first):
            raise ConfigError(key, pattern, f"{found.group()} is empty")
        middles: Iterator[str] = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    else:
        middles = iter(found.group(1).split(","))
    for middle in middles:
        yield from _braces(key, head + middle + tail)


def _listed(root: Path, name: str) -> ImageFile:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        problem = f"{name} is a link to outside of the folder; name a folder that holds both"
        raise ConfigError("data.root", root, problem)
    status = path.stat()
    return ImageFile(name, status.st_size, status.st_mtime_ns)
