"""Weights on the Hugging Face hub: their address, and the file that is downloaded once and kept by its library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distrain.checkpoint.format import DamagedCheckpoint
from distrain.errors import first_line

#: What an address begins with, as in the library's own addresses of files.
PREFIX = "hf://"
_ADDRESS = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")
#: Files of weights under their usual names, the safer one first.
_USUAL_FILES = ("model.safetensors", "pytorch_model.bin")
#: Seconds to wait for the hub's first answer.
_PATIENCE_SECONDS = 20
#: Most characters of the library's error that a message shows.
_LONGEST_REASON = 200


def download(address: str) -> Path:
    """Downloads a file of weights, unless it was downloaded before; several processes may call it at the same time.

    Args:
        address: ``hf://USER/NAME``, which means ``model.safetensors`` or else ``pytorch_model.bin`` there, or
            ``hf://USER/NAME/FILE``; ``@REVISION`` behind the name chooses a branch, a tag or a commit.

    Returns:
        The file in the library's cache.

    Raises:
        DamagedCheckpoint: The library is missing, the hub has no such file, or it can't be reached; one line says what.
    """
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        raise DamagedCheckpoint(
            "is no address of weights: hf://USER/NAME, hf://USER/NAME@REVISION or hf://USER/NAME/FILE"
        )
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise DamagedCheckpoint(
            f"needs the library huggingface_hub ({error}); run pip install 'distrain[hf]'"
        ) from error
    files = (parts["file"],) if parts["file"] else _USUAL_FILES
    for file in files:
        path = _download(huggingface_hub, parts["name"], file, parts["revision"])
        if path is not None:
            return path
    raise DamagedCheckpoint(f"has no file {' or '.join(files)}; name one: hf://{parts['name']}/FILE")


def _download(hub: Any, name: str, file: str, revision: str | None) -> Path | None:
    """The file, or ``None`` if the hub has the repository but no such file."""
    try:
        return Path(hub.hf_hub_download(name, file, revision=revision, etag_timeout=_PATIENCE_SECONDS))
    except hub.errors.LocalEntryNotFoundError as error:
        raise DamagedCheckpoint("was not downloaded before, and the hub can't be reached") from error
    except hub.errors.EntryNotFoundError:
        return None
    except hub.errors.RevisionNotFoundError as error:
        raise DamagedCheckpoint(f"has no revision {revision}") from error
    except hub.errors.RepositoryNotFoundError as error:
        raise DamagedCheckpoint("is not on the hub, or only for its members (log in: hf auth login)") from error
    except Exception as error:  # of whatever library makes the connection
        line = (first_line(error) or "no message")[:_LONGEST_REASON]
        raise DamagedCheckpoint(f"can't be downloaded ({type(error).__name__}: {line})") from error
