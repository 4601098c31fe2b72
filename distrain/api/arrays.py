"""From arrays, tensors and map-style data sets to samples that distrain trains on."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from tqdm import tqdm

from distrain.data.array_images import USUAL_CHANNELS, first_not_finite
from distrain.data.base import DataSpec, Images
from distrain.data.python_object import DataObject
from distrain.data.target_kinds import MOST_CLASSES
from distrain.errors import ConfigError, config_error
from distrain.files.terminal import TERMINAL

#: What may be given for samples, in words.
_KINDS = "a pair (inputs, labels) of arrays or tensors, or a torch Dataset whose items are such pairs"
_CHUNK_BYTES = 1 << 24


def data_object(
    train: Any, val: Any = None, test: Any = None, *, classes: int | Sequence[str] | None = None, memory_limit_mb: int
) -> DataObject:
    """Checks samples and puts them into the form in which they are trained on; arrays are not copied if possible.

    Args:
        train: Training samples: a pair of inputs [N, C, H, W] and class numbers [N], or a map-style data set.
        val: Validation samples, or ``None``.
        test: Test samples, or ``None``.
        classes: Names of the classes, or their number; by default as many as the largest label says.
        memory_limit_mb: A data set that takes more memory than this, in MiB, is refused.

    Raises:
        ConfigError: The samples are of another kind; the line says what to pass.
    """
    given = {name: value for name, value in (("train", train), ("val", val), ("test", test)) if value is not None}
    parts = {name: samples(name, value, memory_limit_mb) for name, value in given.items()}
    shape, dtype = parts["train"].images.shape[1:], parts["train"].images.dtype
    for name, part in parts.items():
        if part.images.shape[1:] != shape:
            problem = f"has inputs {list(part.images.shape[1:])}, and train has {list(shape)}"
            raise config_error(name, problem)
        if part.images.is_floating_point() != dtype.is_floating_point:
            raise config_error(name, f"has inputs of {_short(part.images.dtype)}, and train of {_short(dtype)}")
    spec = _spec(parts["train"], classes, max(int(part.targets.max()) for part in parts.values()))
    return DataObject(spec, parts["train"], parts.get("val"), parts.get("test"), _fingerprint(spec, parts))


def one_part(data: Any, classes: Sequence[str], memory_limit_mb: int) -> DataObject:
    """Samples that are training, validation and test samples at once, to evaluate a model on.

    Args:
        data: The samples, as for :func:`data_object`.
        classes: Names of the classes.
        memory_limit_mb: As above.

    Raises:
        ConfigError: As above.
    """
    part = samples("data", data, memory_limit_mb)
    spec = _spec(part, classes, int(part.targets.max()))
    return DataObject(spec, part, part, part, _fingerprint(spec, {"data": part}))


def _spec(part: Images, classes: int | Sequence[str] | None, largest: int) -> DataSpec:
    dtype = "float" if part.images.is_floating_point() else "uint8"
    channels, height, width = part.images.shape[1:]
    return DataSpec(channels, height, width, _class_names(classes, largest), dtype)


def samples(name: str, value: Any, memory_limit_mb: int) -> Images:
    """One split; see :func:`data_object`.

    Args:
        name: Which one, for messages.
        value: The samples.
        memory_limit_mb: As above.

    Raises:
        ConfigError: As above.
    """
    if isinstance(value, DataLoader):
        raise config_error(name, f"is a DataLoader; pass its data set, {name}=loader.dataset, and batch_size=…")
    if isinstance(value, TensorDataset) and len(value.tensors) == 2:
        value = value.tensors
    if isinstance(value, Mapping):
        keys = ", ".join(f"{name}[{key!r}]" for key in list(value)[:2])
        raise config_error(name, f"is a {type(value).__name__}; pass a pair (inputs, labels), such as {name}=({keys})")
    if isinstance(value, Dataset) or (hasattr(value, "__getitem__") and not isinstance(value, Sequence | np.ndarray)):
        value = _read(name, value, memory_limit_mb)
    if not isinstance(value, tuple | list) or len(value) != 2:
        kind = type(value).__name__ + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
        raise config_error(name, f"is a {kind}; pass {_KINDS}{_hint(name, value)}")
    images, labels = inputs(name, value[0]), _labels(name, value[1])
    if len(images) != len(labels):
        raise config_error(name, f"has {len(images)} inputs and {len(labels)} labels")
    if not len(images):
        raise config_error(name, "has no samples")
    return Images(images, labels)


def _hint(name: str, value: Any) -> str:
    """What to type instead of something that is often tried for samples."""
    if isinstance(value, float) and 0 < value < 1 and name == "val":
        return f"; to hold out a part of train pass keys={{'data.val_fraction': {value:g}}}"
    if isinstance(value, np.ndarray | Tensor):
        return f": {name}=(inputs, labels)"
    if isinstance(value, list | Iterator):
        return f": x, y = zip(*pairs), then {name}=(np.stack(x), y)"
    return ""


def inputs(name: str, value: Any) -> Tensor:
    """Images as a tensor [N, C, H, W] on the CPU, uint8 or floating point.

    Args:
        name: Which ones, for messages.
        value: An array or a tensor.

    Raises:
        ConfigError: They have another shape or type, or are not finite.
    """
    images = _tensor(name, "inputs", value)
    shape = list(images.shape)
    if images.dim() != 4:
        hint = "x[:, None] adds a channel" if images.dim() == 3 else "x[:, :, None, None] makes columns channels"
        hint = f" ({hint})" if images.dim() in (2, 3) else ""
        raise config_error(name, f"has inputs {shape}; images [N, C, H, W] are needed{hint}")
    if shape[1] not in USUAL_CHANNELS and shape[3] in USUAL_CHANNELS and shape[1] > shape[3]:
        problem = f"has inputs {shape}, which look like [N, H, W, C]; pass [N, C, H, W]: x.transpose(0, 3, 1, 2)"
        raise config_error(name, f"{problem} of an array, x.permute(0, 3, 1, 2) of a tensor")
    if 0 in shape[1:]:
        raise config_error(name, f"has inputs {shape}, without a pixel")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        problem = f"has inputs of {_short(images.dtype)}; pass uint8 for pixel values from 0 to 255, or float32"
        raise config_error(name, problem)
    if (row := first_not_finite(images)) is not None:
        raise config_error(f"{name}[{row}]", "has inputs that are NaN or infinite")
    return images


def _labels(name: str, value: Any) -> Tensor:
    """Class numbers as int64 [N]."""
    labels = _tensor(name, "labels", value)
    if labels.dim() == 2 and labels.shape[1] > 1:
        hint = "for one row of a column per class pass y.argmax(1)"
        raise config_error(name, f"has labels {list(labels.shape)}; class numbers [N] are needed: {hint}")
    if labels.dim() != 1:
        hint = ": pass y[:, 0]" if labels.dim() == 2 else ""
        raise config_error(name, f"has labels {list(labels.shape)}; class numbers [N] are needed{hint}")
    if labels.is_floating_point() or labels.is_complex():
        problem = f"has labels of {_short(labels.dtype)}; pass class numbers as whole numbers"
        raise config_error(name, f"{problem}: y.astype(int) of an array, y.long() of a tensor")
    labels = labels.long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < MOST_CLASSES:
        low, high = int(labels.min()), int(labels.max())
        raise config_error(name, f"has labels from {low} to {high}; classes are numbered from 0")
    return labels


def _tensor(name: str, part: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            raise config_error(name, f"has {part} that are no ordinary dense tensor")
        return value.detach().cpu()
    try:
        array = np.asarray(value)
        # Nothing writes to the samples, so an array that can't be written serves as well.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")
            # A tensor has no negative strides and no foreign byte order.
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
            return torch.from_numpy(np.ascontiguousarray(array))
    except (TypeError, ValueError) as error:
        if part == "labels" and np.asarray(value).dtype.kind == "U":
            problem = "has labels that are text; number them: names, y = np.unique(y, return_inverse=True), and pass"
            raise config_error(name, f"{problem} classes=list(names)") from error
        kind = f"{array.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
        raise config_error(name, f"has {part} that are no numbers: a {kind} ({error})") from error


def _read(name: str, dataset: Any, memory_limit_mb: int) -> tuple[Tensor, list[int]]:
    """Reads a map-style data set once, item by item."""
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise config_error(name, f"{kind} has no length and no items by number; pass {_KINDS}")
    count = len(dataset)
    if not count:
        raise config_error(name, f"{kind} has no samples")
    labels: list[int] = []
    images = torch.empty(0)
    for place in tqdm(range(count), desc=f"reading {name}", unit="sample", disable=None, leave=False, file=TERMINAL):
        image, label = _item(name, dataset, place)
        if place == 0:
            size = count * image.nbytes / (1 << 20)
            if size > memory_limit_mb:
                problem = f"the {count} samples of {kind} need {size:,.0f} MiB; a data set is copied to memory"
                raise ConfigError("data.memory_limit_mb", memory_limit_mb, problem)
            images = torch.empty((count, *image.shape), dtype=image.dtype)
        if image.shape != images.shape[1:] or image.dtype != images.dtype:
            problem = f"{_short(image.dtype)} {list(image.shape)}, and the first {_short(images.dtype)}"
            raise config_error(f"{name}[{place}]", f"is {problem} {list(images.shape[1:])}; make them alike")
        images[place] = image
        labels.append(label)
    return images, labels


def _item(name: str, dataset: Any, place: int) -> tuple[Tensor, int]:
    """An image [C, H, W] and its class number."""
    where = f"{name}[{place}]"
    try:
        item = dataset[place]
    except Exception as error:  # a user's data set may raise anything
        raise config_error(where, f"fails ({type(error).__name__}: {error})") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        hint = f", not dictionaries of {', '.join(map(str, item))}" if isinstance(item, dict) else ""
        kind = type(item).__name__ + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
        problem = f"is a {kind}; items must be pairs (input, label){hint}"
        raise config_error(where, f"{problem}: let __getitem__ return such a pair")
    image = _tensor(where, "an input", item[0])
    if not isinstance(item[0], Tensor | np.ndarray) and image.dim() in (2, 3):
        # A picture of Pillow's: rows, columns, and channels last.
        image = image.unsqueeze(0) if image.dim() == 2 else image.permute(2, 0, 1)
    if image.dim() != 3:
        raise config_error(where, f"has an input {list(image.shape)}; images [C, H, W] are needed")
    label = np.asarray(item[1])
    if label.size != 1 or label.dtype.kind not in "iub":
        hint = ": return label.argmax()" if label.ndim == 1 and label.size > 1 else ": return int(label)"
        raise config_error(where, f"has the label {item[1]!r}; a class number is needed{hint}")
    return image, int(label.reshape(()))


def _class_names(classes: int | Sequence[str] | None, largest: int) -> tuple[str, ...]:
    if classes is None:
        return tuple(map(str, range(largest + 1)))
    if isinstance(classes, bool | str) or not isinstance(classes, int | Sequence):
        raise ConfigError("classes", classes, "must be the number of classes, or a list of their names")
    names = tuple(map(str, range(classes) if isinstance(classes, int) else classes))
    if largest >= len(names):
        raise ConfigError("classes", len(names), f"is too few: there are labels up to {largest}")
    if len(names) > MOST_CLASSES:
        raise ConfigError("classes", len(names), f"is more than {MOST_CLASSES}")
    return names


def _fingerprint(spec: DataSpec, parts: dict[str, Images]) -> str:
    """A hash of shapes, types and contents."""
    digest = hashlib.blake2b(repr(spec).encode(), digest_size=16)
    for name, part in parts.items():
        for tensor in (part.images, part.targets):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            for chunk in byte_chunks(tensor):
                digest.update(chunk)
    return digest.hexdigest()


def byte_chunks(tensor: Tensor) -> Iterable[memoryview]:
    """The content of a tensor, some megabytes at a time."""
    rows = max(1, _CHUNK_BYTES // max(1, tensor[0].numel() * tensor.element_size()))
    for chunk in tensor.split(rows):
        yield memoryview(chunk.contiguous().view(torch.uint8).numpy()).cast("B")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
