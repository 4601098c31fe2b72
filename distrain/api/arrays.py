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
from distrain.data.base import IGNORED, DataSpec, Images
from distrain.data.python_object import DataObject
from distrain.data.target_kinds import MOST_CLASSES, TargetError, is_black_and_white, to_targets, whiten
from distrain.errors import ConfigError, config_error
from distrain.files.terminal import TERMINAL

#: What may be given for samples, in words.
_KINDS = "a pair (inputs, labels) of arrays or tensors, or a torch Dataset whose items are such pairs"
#: What to type for targets that are no class numbers.
_OTHER_TASKS = "(for several labels a sample task='multilabel', for numbers task='regression')"
_CHUNK_BYTES = 1 << 24


def data_object(
    train: Any,
    val: Any = None,
    test: Any = None,
    *,
    target: str = "class",
    classes: int | Sequence[str] | None = None,
    memory_limit_mb: int,
) -> DataObject:
    """Checks samples and puts them into the form in which they are trained on; arrays are not copied if possible.

    Args:
        train: Training samples: a pair of inputs [N, C, H, W] and targets, or a map-style data set.
        val: Validation samples, or ``None``.
        test: Test samples, or ``None``.
        target: Kind of the targets; see :attr:`distrain.data.base.DataSpec.target`.
        classes: Names of the classes, labels or numbers, or how many there are; by default as many as targets have.
        memory_limit_mb: A data set that takes more memory than this, in MiB, is refused.

    Raises:
        ConfigError: The samples are of another kind; the line says what to pass.
    """
    given = {name: value for name, value in (("train", train), ("val", val), ("test", test)) if value is not None}
    parts = _whitened(target, {name: samples(name, value, target, memory_limit_mb) for name, value in given.items()})
    shape, dtype = parts["train"].images.shape[1:], parts["train"].images.dtype
    for name, part in parts.items():
        if part.images.shape[1:] != shape:
            problem = f"has inputs {list(part.images.shape[1:])}, and train has {list(shape)}"
            raise config_error(name, problem)
        if part.images.is_floating_point() != dtype.is_floating_point:
            raise config_error(name, f"has inputs of {_short(part.images.dtype)}, and train of {_short(dtype)}")
    spec = _spec(parts, target, classes)
    return DataObject(spec, parts["train"], parts.get("val"), parts.get("test"), _fingerprint(spec, parts))


def one_part(data: Any, target: str, classes: Sequence[str], memory_limit_mb: int) -> DataObject:
    """Samples that are training, validation and test samples at once, to evaluate a model on.

    Args:
        data: The samples, as for :func:`data_object`.
        target: Kind of the targets.
        classes: Names of the classes, labels or numbers.
        memory_limit_mb: As above.

    Raises:
        ConfigError: As above.
    """
    part = _whitened(target, {"data": samples("data", data, target, memory_limit_mb)})["data"]
    spec = _spec({"data": part}, target, classes)
    return DataObject(spec, part, part, part, _fingerprint(spec, {"data": part}))


def _spec(parts: Mapping[str, Images], target: str, classes: int | Sequence[str] | None) -> DataSpec:
    first = next(iter(parts.values()))
    dtype = "float" if first.images.is_floating_point() else "uint8"
    channels, height, width = first.images.shape[1:]
    if target in ("labels", "numbers"):
        names = _column_names(parts, target, classes)
    else:
        names = _class_names(classes, max(_largest(part.targets) for part in parts.values()))
    return DataSpec(channels, height, width, names, dtype, target)


def _largest(targets: Tensor) -> int:
    """The largest class number in targets; in masks, uint8, one number stands for unknown."""
    known = targets[targets != IGNORED] if targets.dtype == torch.uint8 else targets
    return int(known.max()) if known.numel() else 0


def _whitened(target: str, parts: dict[str, Images]) -> dict[str, Images]:
    """The parts with classes 0 and 1 where masks are black and white, as in files of masks."""
    if target != "mask" or not is_black_and_white(part.targets for part in parts.values()):
        return parts
    return {name: Images(part.images, whiten(part.targets)) for name, part in parts.items()}


def samples(name: str, value: Any, target: str, memory_limit_mb: int) -> Images:
    """One split; see :func:`data_object`.

    Args:
        name: Which one, for messages.
        value: The samples.
        target: As above.
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
        value = _read(name, value, target, memory_limit_mb)
    if not isinstance(value, tuple | list) or len(value) != 2:
        kind = type(value).__name__ + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
        raise config_error(name, f"is a {kind}; pass {_KINDS}{_hint(name, value)}")
    images = inputs(name, value[0])
    targets = _labels(name, value[1]) if target == "class" else _targets(name, value[1], target)
    if len(images) != len(targets):
        raise config_error(name, f"has {len(images)} inputs and {len(targets)} labels")
    if not len(images):
        raise config_error(name, "has no samples")
    if target == "mask" and targets.shape[1:] != images.shape[2:]:
        problem = f"has masks {list(targets.shape[1:])} for images {list(images.shape[2:])}; they must have one size"
        raise config_error(name, problem)
    return Images(images, targets)


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
        hint = f"for one row of a column per class pass y.argmax(1) {_OTHER_TASKS}"
        raise config_error(name, f"has labels {list(labels.shape)}; class numbers [N] are needed: {hint}")
    if labels.dim() != 1:
        hint = ": pass y[:, 0]" if labels.dim() == 2 else ""
        raise config_error(name, f"has labels {list(labels.shape)}; class numbers [N] are needed{hint}")
    if labels.is_floating_point() or labels.is_complex():
        problem = f"has labels of {_short(labels.dtype)}; pass class numbers as whole numbers"
        raise config_error(name, f"{problem}: y.astype(int) of an array, y.long() of a tensor {_OTHER_TASKS}")
    labels = labels.long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < MOST_CLASSES:
        low, high = int(labels.min()), int(labels.max())
        raise config_error(name, f"has labels from {low} to {high}; classes are numbered from 0")
    return labels


def _targets(name: str, value: Any, target: str) -> Tensor:
    """Targets that are no class numbers, in the form in which a task takes them."""
    array = _tensor(name, "labels", value)
    # NumPy has no bfloat16.
    array = array.float() if array.dtype == torch.bfloat16 else array
    try:
        return to_targets(target, array.numpy())
    except TargetError as error:
        where = name if error.row is None else f"{name}[{error.row}]"
        raise config_error(where, f"has a target that {error.problem}") from error


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


def _read(name: str, dataset: Any, target: str, memory_limit_mb: int) -> tuple[Tensor, Any]:
    """Reads a map-style data set once, item by item: the images, and the targets as a list or a tensor."""
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise config_error(name, f"{kind} has no length and no items by number; pass {_KINDS}")
    count = len(dataset)
    if not count:
        raise config_error(name, f"{kind} has no samples")
    labels: list[Any] = []
    images = torch.empty(0)
    for place in tqdm(range(count), desc=f"reading {name}", unit="sample", disable=None, leave=False, file=TERMINAL):
        image, label = _item(name, dataset, place, target)
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
        if target != "class" and label.shape != (labels or [label])[0].shape:
            problem = f"{list(label.shape)}, and the first {list(labels[0].shape)}; make them alike"
            raise config_error(f"{name}[{place}]", f"has a target {problem}")
        labels.append(label)
    return images, labels if target == "class" else torch.stack(labels)


def _item(name: str, dataset: Any, place: int, target: str) -> tuple[Tensor, Any]:
    """An image [C, H, W] and its class number; of other kinds the target as a tensor."""
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
    if target != "class":
        return image, _tensor(where, "labels", item[1])
    label = np.asarray(item[1])
    if label.size != 1 or label.dtype.kind not in "iub":
        hint = ": return label.argmax()" if label.ndim == 1 and label.size > 1 else ": return int(label)"
        raise config_error(where, f"has the label {item[1]!r}; a class number is needed{hint} {_OTHER_TASKS}")
    return image, int(label.reshape(()))


def _column_names(parts: Mapping[str, Images], target: str, classes: int | Sequence[str] | None) -> tuple[str, ...]:
    """Names of the columns of targets [N, C]: of labels or numbers."""
    width = next(iter(parts.values())).targets.shape[1]
    names = _class_names(width if classes is None else classes, 0)
    for name, part in parts.items():
        if part.targets.shape[1] != len(names):
            raise config_error(name, f"has {part.targets.shape[1]} {target} a sample, and {len(names)} are named")
    return names


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
