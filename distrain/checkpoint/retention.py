"""Which checkpoints of a run stay, and what is done with the temporary folders of processes that died."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path

from distrain.checkpoint.format import TEMPORARY_NAME, list_checkpoints, step_of, temporary_path
from distrain.checkpoint.reader import is_valid
from distrain.files.contained_folder import ContainedFolder
from distrain.health.process import may_exist

log = logging.getLogger(__name__)

#: A temporary folder that nobody has changed for this long is abandoned, whatever host its process was on.
_ABANDONED_SECONDS = 3600


def prune(folder: Path, keep: int, best_step: int | None, newest_step: int) -> None:
    """Removes all but the newest ``keep`` checkpoints and the best one. What can't be removed is named in the log.

    Args:
        folder: The run's ``checkpoints`` folder.
        keep: How many of the newest checkpoints stay.
        best_step: Step of the best checkpoint.
        newest_step: Step of the checkpoint that was just saved. Later steps belong to an abandoned branch, since the
            run went back to an earlier checkpoint or began anew. They are deleted, or a later start would resume them.
    """
    try:
        _prune(folder, keep, best_step, newest_step)
    except OSError as error:
        log.warning("can't look for old checkpoints: %s", error)


def _prune(folder: Path, keep: int, best_step: int | None, newest_step: int) -> None:
    paths = {step_of(path): path for path in list_checkpoints(folder)}
    abandoned = [path for step, path in paths.items() if step > newest_step]
    if abandoned:
        log.warning("removing checkpoints of an abandoned branch of this run: %s", ", ".join(map(str, abandoned)))
    current = sorted(step for step in paths if step <= newest_step)
    for path in [*abandoned, *(paths[step] for step in current[:-keep] if step != best_step)]:
        removed = path.with_name(f"{temporary_path(path).name}.removed")
        try:
            # Renamed first: a folder that is being deleted must not look like a checkpoint.
            contained, name = ContainedFolder(folder.parent), f"{folder.name}/{removed.name}"
            contained.rename(f"{folder.name}/{path.name}", name)
            contained.remove_tree(name)
        except OSError as error:
            log.warning("can't remove an old checkpoint: %s", error)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary folders of processes that died while they saved; call it before this process saves.

    A temporary folder that is complete is published as a checkpoint instead; see :func:`publish`.
    """
    try:
        paths = sorted(folder.glob(".step_*"))
    except OSError as error:
        log.warning("can't look for folders left by a process that died: %s", error)
        return
    for path in paths:
        parsed = TEMPORARY_NAME.fullmatch(path.name)
        if parsed is None:
            continue
        try:
            if _is_in_use(path, parsed[2], int(parsed[3])):
                continue
            if (final := publish(path)) is not None:
                log.warning("published %s, which was complete when its process died", final)
            else:
                ContainedFolder(folder.parent).remove_tree(f"{folder.name}/{path.name}")
                log.info("removed %s, left by a process that died", path)
        except OSError as error:
            log.warning("can't remove a folder left by a process that died: %s", error)


def publish(temporary: Path) -> Path | None:
    """Publishes a complete temporary folder under its final name.

    Returns:
        The checkpoint, or ``None`` if the folder is not complete or the checkpoint exists already.
    """
    parsed = TEMPORARY_NAME.fullmatch(temporary.name)
    if parsed is None or parsed[4] == ".removed":
        return None
    final = temporary.with_name(parsed[1])
    if final.exists() or not is_valid(temporary):
        return None
    folder = temporary.parent
    ContainedFolder(folder.parent).rename(f"{folder.name}/{temporary.name}", f"{folder.name}/{final.name}")
    return final


def _is_in_use(path: Path, host: str | None, pid: int) -> bool:
    """Whether the process that made a temporary folder may still be alive."""
    if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
        return False
    if host != socket.gethostname():
        return True
    return pid != os.getpid() and may_exist(pid)
