"""The forms in which people's data sets give a sample: pairs or dictionaries; tensors, arrays or pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distrain.data.array_images import USUAL_CHANNELS

#: Usual names of the image and of the target in samples that are dictionaries.
_IMAGE_KEYS = ("image", "img", "pixel_values", "x", "input", "inputs", "images")
_TARGET_KEYS = ("label", "labels", "target", "targets", "class", "y", "mask")
#: Modes of pictures whose values are pixels of one, three or four channels.
_PIXEL_MODES = ("L", "RGB", "RGBA")


def parts_of(sample: Any, keys: Sequence[str] | None = None) -> tuple[Any, Any]:
    """The image and the target of a sample.

    Args:
        sample: As the data set gives it.
        keys: Names of both, if the sample is a dictionary; ``None``: found among usual names.

    Raises:
        ValueError: It is neither a pair nor a dictionary that has both.
    """
    if isinstance(sample, Mapping):
        usual = [next((key for key in names if key in sample), "") for names in (_IMAGE_KEYS, _TARGET_KEYS)]
        named = keys or usual
        if missing := [key for key in named if key not in sample]:
            what = f"no {missing[0]}" if keys else "no usual names of an image and a target"
            found = ", ".join(map(str, sample))
            raise ValueError(f"a sample has {what}; data.keys=[IMAGE,TARGET] names two of its keys: {found}")
        return sample[named[0]], sample[named[1]]
    if isinstance(sample, tuple | list) and len(sample) == 2:
        return sample[0], sample[1]
    count = f" of {len(sample)}" if isinstance(sample, tuple | list) else ""
    raise ValueError(f"a sample is a {type(sample).__name__}{count}; return a pair (image, target), or a dictionary")


def image_of(value: Any) -> Tensor:
    """An image as a tensor [C, H, W], uint8 or floating point.

    Args:
        value: A tensor [C, H, W] or [H, W], an array [H, W, C], [C, H, W] or [H, W], or a picture of Pillow's.

    Raises:
        ValueError: It is of no such form.
    """
    if isinstance(value, Image.Image):
        if value.mode not in _PIXEL_MODES and not value.mode.startswith(("I", "F")):
            value = value.convert("L" if value.mode == "1" else "RGB")
        value = np.asarray(value)
        value = value if value.ndim == 3 else value[:, :, None]
        image = torch.from_numpy(np.array(value.transpose(2, 0, 1)))
    elif isinstance(value, Tensor):
        image = value.detach().cpu()
        if image.dim() == 3 and image.shape[0] not in USUAL_CHANNELS and image.shape[2] in USUAL_CHANNELS:
            problem = f"the image is {list(image.shape)}, which looks like [H, W, C]"
            raise ValueError(f"{problem}; a tensor is [C, H, W]: return image.permute(2, 0, 1)")
    elif isinstance(value, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(_channels_first(value)))
    else:
        kind = type(value).__name__
        raise ValueError(
            f"the image is a {kind}; return a tensor [C, H, W], an array [H, W, C] or a picture of Pillow's"
        )
    image = image[None] if image.dim() == 2 else image
    if image.dim() != 3 or 0 in image.shape:
        raise ValueError(f"the image is {list(image.shape)}; [C, H, W] is needed")
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * 255
    if image.dtype != torch.uint8 and not image.is_floating_point():
        kind = str(image.dtype).removeprefix("torch.")
        raise ValueError(f"the image is of {kind}; return uint8 for values from 0 to 255, or float32")
    return image


def _channels_first(array: Any) -> Any:
    if array.dtype.byteorder not in "=|":
        array = array.astype(array.dtype.newbyteorder("="))
    if array.ndim != 3:
        return array
    if array.shape[2] in USUAL_CHANNELS and array.shape[2] < array.shape[0]:
        return array.transpose(2, 0, 1)
    if array.shape[0] in USUAL_CHANNELS:
        return array
    raise ValueError(
        f"the image is an array {list(array.shape)}, neither [H, W, C] nor [C, H, W] of 1, 3 or 4 channels"
    )


def kind_of_target(value: Any, classes: Sequence[str], image: Sequence[int]) -> str:
    """What kind of target a sample has; see :attr:`distrain.data.base.DataSpec.target`.

    Args:
        value: The target as the data set gives it.
        classes: Names of the classes, as far as they are known.
        image: Shape [C, H, W] of the sample's image.

    Raises:
        ValueError: It is of no known form.
    """
    tensor = _target(value, classes)
    whole = not tensor.is_floating_point()
    if tensor.dim() >= 2:
        if whole and tuple(tensor.shape[-2:]) == tuple(image[-2:]) and tensor[..., 0, 0].numel() == 1:
            return "mask"
    elif whole:
        return "class" if tensor.numel() == 1 else "labels"
    elif tensor.numel():
        return "numbers"
    shape = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    raise ValueError(f"the target is {shape}: no class number, labels, numbers, or mask of the image's size")


def target_of(value: Any, kind: str | None, classes: Sequence[str]) -> Tensor:
    """A target as a tensor of the shape that its kind has.

    Args:
        value: The target as the data set gives it: a number, the name of a class, an array, a tensor or a picture.
        kind: See :func:`kind_of_target`.
        classes: Names of the classes.

    Raises:
        ValueError: It is of no known form.
    """
    tensor = _target(value, classes)
    if kind == "class" and tensor.numel() == 1:
        return tensor.reshape(())
    if kind in ("labels", "numbers") and tensor.dim() < 2:
        return tensor.reshape(-1)
    if kind == "mask" and tensor.dim() == 3 and tensor.shape[0] == 1:
        return tensor[0]
    return tensor


def _target(value: Any, classes: Sequence[str]) -> Tensor:
    if isinstance(value, str):
        if value not in classes:
            named = f"; data.classes=[{value},…] names the classes" if not classes else ""
            raise ValueError(f"the target is {value!r}, which is none of the classes{named}")
        return torch.tensor(list(classes).index(value))
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    if array.dtype.kind not in "iufb":
        kind = type(value).__name__
        raise ValueError(f"the target is a {kind} that is no number; return a class number, an array or a tensor")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array.astype(array.dtype.newbyteorder("="))))


def class_numbers(labels: Any, count: int) -> Tensor | None:
    """The class of each sample from an attribute of a data set, int64 [count]; ``None`` if it is something else."""
    if not isinstance(labels, list | tuple | np.ndarray | Tensor) or len(labels) != count:
        return None
    try:
        array = np.asarray(labels)
    except (TypeError, ValueError):  # tensors of several sizes, for example
        return None
    if array.dtype.kind not in "iu" or array.size != count or array.min() < 0:
        return None
    return torch.from_numpy(array.reshape(-1).astype(np.int64))
