"""Masks as PNG files of class numbers, named after the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from distrain.errors import ConfigError
from distrain.tools.predicting.result_files import Prediction


class MaskFiles:
    """Writes masks.

    Args:
        folder: Where to.
        paths: All images, by which names that occur twice are told apart: ``a.png``, ``a_2.png``.
    """

    def __init__(self, folder: Path, paths: Iterable[str]) -> None:
        self._folder, used = folder, Counter[str]()
        self._names: dict[str, str] = {}
        for path in dict.fromkeys(paths):
            stem = Path(path).stem
            used[stem] += 1
            self._names[path] = f"{stem}.png" if used[stem] == 1 else f"{stem}_{used[stem]}.png"

    def write(self, prediction: Prediction) -> Prediction:
        """Writes a prediction's mask, and returns the prediction with the file's path instead of it.

        Raises:
            ConfigError: The file can't be written.
        """
        if "mask" not in prediction:
            return prediction
        path = self._folder / self._names[prediction["path"]]
        try:
            Image.fromarray(prediction["mask"]).save(path)
        except OSError as error:
            raise ConfigError("masks", path, f"can't be written ({error.strerror or error})") from error
        return {**prediction, "mask": str(path)}
