"""The releases of torch that distrain was tested with."""

from __future__ import annotations

import logging
import re

import torch

log = logging.getLogger(__name__)

#: Oldest and newest release tested. pyproject.toml names the oldest too, and has no newest: a newer torch may work, and
#: nobody should lose it by installing distrain.
OLDEST_TESTED, NEWEST_TESTED = "2.6.0", "2.15.0"


def warn_if_untested(version: str = torch.__version__) -> None:
    """Logs one warning if a release of torch is newer than those tested, or older.

    Only the release counts: neither a build such as ``+cpu``, nor a patch release of the newest minor release.

    Args:
        version: As torch names itself.
    """
    if _minor(version) > _minor(NEWEST_TESTED):
        log.warning("torch %s is newer than %s, the newest that distrain was tested with", version, NEWEST_TESTED)
    elif _minor(version) < _minor(OLDEST_TESTED):
        log.warning("torch %s is older than %s, the oldest that distrain was tested with", version, OLDEST_TESTED)


def _minor(version: str) -> tuple[int, ...]:
    """``(2, 15)`` for ``2.15.1+cu132``; for what names no release, the newest tested, so that nothing is said."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else _minor(NEWEST_TESTED)
