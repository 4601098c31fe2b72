"""A folder with a run's model as hubs of models expect it: ``model.safetensors``, ``config.json``, ``README.md``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distrain.checkpoint import safetensors_writer
from distrain.errors import ConfigError, first_line
from distrain.models import timm
from distrain.tools.exporting import card
from distrain.tools.exporting.described_model import DescribedModel

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: The variable that holds the Hub's token; a token that a login has left on this machine is not used.
_TOKEN = "HF_TOKEN"  # noqa: S105 - a variable's name


def write(
    folder: Path,
    model: DescribedModel,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    licence: str | None,
) -> None:
    """Makes the folder.

    Args:
        folder: Must not exist.
        model: What the folder says of the model.
        tensors: The ``state_dict``.
        metadata: For the header of the weights.
        licence: Name of the licence for the model card; ``None``: it names none.

    Raises:
        OSError: A file can't be written.
    """
    folder.mkdir()
    safetensors_writer.write_alone(folder / WEIGHTS, tensors, metadata)
    (folder / CONFIG).write_text(json.dumps(_config(model), indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card.text(model, licence), encoding="utf-8")


def _config(described: DescribedModel) -> dict[str, Any]:
    """The content of ``config.json``.

    The arguments of the model stand at the top, where ``PyTorchModelHubMixin`` looks for them; for an architecture of
    timm, what timm's loader looks for.
    """
    model, spec = described.config.model, described.spec
    if not isinstance(model, timm.TimmConfig):
        return {"architecture": model._target_, "distrain": described.needed_to_use(), **described.arguments}
    weights = {
        "num_classes": len(spec.classes),
        "input_size": [spec.channels, spec.height, spec.width],
        "mean": list(described.mean),
        "std": list(described.std),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "label_names": list(spec.classes),
    }
    arguments = timm.architecture_arguments(**described.arguments)
    return {
        "architecture": model.arch.partition(".")[0],
        "num_classes": len(spec.classes),
        "model_args": {name: value for name, value in arguments.items() if name != "num_classes"},
        "pretrained_cfg": weights,
        "distrain": described.needed_to_use(),
    }


def add_to_card(folder: Path, section: str) -> None:
    """Adds a section, which begins with its heading, at the end of a folder's model card."""
    with (folder / CARD).open("a", encoding="utf-8") as card_file:
        card_file.write(f"\n{section}")


def check_push(repository: str) -> None:
    """Refuses an upload that could not work, before anything is written.

    Raises:
        ConfigError: The name is not USER/NAME, a library is missing, or there is no token.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError("push", repository, "is not of the form USER/NAME")
    try:
        import huggingface_hub  # noqa: F401 - only whether it is there
    except ImportError as error:
        problem = f"needs the library huggingface_hub ({error}); run pip install 'distrain[hf]'"
        raise ConfigError("push", repository, problem) from error
    if not os.environ.get(_TOKEN):
        raise ConfigError("push", repository, f"needs a token with write access in the variable {_TOKEN}")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads a folder to the Hugging Face Hub; returns its address there.

    Args:
        folder: Result of :func:`write`.
        repository: USER/NAME; made if there is no such.
        private: Whether a repository that is made here is private.

    Raises:
        ConfigError: The Hub can't be reached or refuses; the folder stays.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi(token=os.environ[_TOKEN])
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by distrain export")
    except Exception as error:  # of whatever library makes the connection
        problem = f"can't be uploaded ({type(error).__name__}: {first_line(error)}); {folder} is complete"
        raise ConfigError("push", repository, problem) from error
    return str(getattr(commit, "repo_url", None) or f"https://huggingface.co/{repository}")
