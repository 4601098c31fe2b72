"""A folder with a run's model as hubs of models expect it: ``model.safetensors``, ``config.json``, ``README.md``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import distrain
from distrain.checkpoint import safetensors_writer
from distrain.config.schema import Config
from distrain.data.base import DataSpec
from distrain.errors import ConfigError, first_line
from distrain.models import timm
from distrain.models.arguments import DataShape
from distrain.models.build import model_arguments
from distrain.tools.exporting import card

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: The variable that holds the Hub's token; a token that a login has left on this machine is not used.
_TOKEN = "HF_TOKEN"  # noqa: S105 - a variable's name


@dataclass(frozen=True)
class ModelFolder:
    """What the folder says of a model.

    Attributes:
        run: The run's folder.
        config: The run's configuration.
        spec: Of the images.
        mean: Channel means with which images are normalised.
        std: Channel standard deviations with which images are normalised.
        step: Number of updates of the checkpoint.
        kind: ``last``, or the average of the model: ``ema`` or ``swa``.
        allowed: Dotted prefixes that the model's class may have.
    """

    run: Path
    config: Config
    spec: DataSpec
    mean: tuple[float, ...]
    std: tuple[float, ...]
    step: int
    kind: str
    allowed: Sequence[str]

    def write(
        self, folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], licence: str | None
    ) -> None:
        """Makes the folder.

        Args:
            folder: Must not exist.
            tensors: The ``state_dict``.
            metadata: For the header of the weights.
            licence: Name of the licence for the model card; ``None``: it names none.

        Raises:
            ConfigError: The model's class can't be imported or is not allowed.
            OSError: A file can't be written.
        """
        shape = DataShape(self.spec.channels, len(self.spec.classes), (self.spec.height, self.spec.width))
        arguments = model_arguments(self.config.model, shape, self.allowed)
        folder.mkdir()
        safetensors_writer.write_alone(folder / WEIGHTS, tensors, metadata)
        (folder / CONFIG).write_text(json.dumps(self._config(arguments), indent=2) + "\n", encoding="utf-8")
        text = card.text(self.run, self.config, self.spec, self.step, self.kind, arguments, self._described(), licence)
        (folder / CARD).write_text(text, encoding="utf-8")

    def _described(self) -> dict[str, Any]:
        """What is needed to use the model, whatever loads it."""
        return {
            "model": self.config.model.name,
            "task": self.config.task.name,
            "classes": list(self.spec.classes),
            "input_shape": [self.spec.channels, self.spec.height, self.spec.width],
            "mean": list(self.mean),
            "std": list(self.std),
            "step": self.step,
            "weights": self.kind,
            "version": distrain.__version__,
        }

    def _config(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The content of ``config.json``.

        The arguments of the model stand at the top, where ``PyTorchModelHubMixin`` looks for them; for an architecture
        of timm, what timm's loader looks for.
        """
        model = self.config.model
        if not isinstance(model, timm.TimmConfig):
            return {"architecture": model._target_, "distrain": self._described(), **arguments}
        size = [self.spec.channels, self.spec.height, self.spec.width]
        weights = {
            "num_classes": len(self.spec.classes),
            "input_size": size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "label_names": list(self.spec.classes),
        }
        return {
            "architecture": model.arch.partition(".")[0],
            "num_classes": len(self.spec.classes),
            "model_args": {
                name: value for name, value in timm.architecture_arguments(**arguments).items() if name != "num_classes"
            },
            "pretrained_cfg": weights,
            "distrain": self._described(),
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
        folder: Result of :meth:`ModelFolder.write`.
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
