"""What a run says of its data in ``data.json`` and in each checkpoint, and what a later start finds changed in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from distrain.data.base import Splits

FILE = "data.json"
#: Largest file that is read, in bytes.
MAX_BYTES = 1 << 24
#: Most renamed classes that a message shows.
_MOST_CLASSES = 5


def data_manifest(splits: Splits) -> dict[str, Any]:
    """What somebody who has the run but not the data must know to use the model, and the number of samples."""
    samples = {"train": len(splits.train), "val": len(splits.val), "test": len(splits.test)}
    content: dict[str, Any] = {} if splits.fingerprint is None else {"fingerprint": splits.fingerprint}
    if splits.class_weights is not None:
        content["class_weights"] = list(splits.class_weights)
    return {**asdict(splits.spec), "mean": list(splits.mean), "std": list(splits.std), "samples": samples, **content}


def data_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Each entry of a manifest that differs, as ``key: old → new``.

    Args:
        old: The manifest of an earlier start. Older releases wrote fewer entries; what it lacks is not compared.
        new: This start's, or those entries of it that are to be compared.
    """
    changes = []
    for key in (key for key in new if key in old):
        before, now = old[key], new[key]
        if key == "samples":
            changes += [f"samples.{part}: {before[part]} → {now[part]}" for part in now if _differ(part, before, now)]
        elif key == "classes":
            changes += _class_changes(list(before), list(now))
        elif key in ("mean", "std", "class_weights"):
            if list(before) != list(now):
                changes.append(f"{key}: {_numbers(before, now)} → {_numbers(now, before)}")
        elif before != now and key != "fingerprint":
            changes.append(f"{key}: {before} → {now}")
    if not changes and "fingerprint" in new and old.get("fingerprint", new["fingerprint"]) != new["fingerprint"]:
        changes.append("samples or targets have other values, and are as many as before")
    return changes


def _differ(key: str, old: Mapping[str, int], new: Mapping[str, int]) -> bool:
    return key in old and old[key] != new[key]


def _class_changes(old: list[str], new: list[str]) -> list[str]:
    if len(old) != len(new):
        return [f"number of classes: {len(old)} → {len(new)}"]
    renamed = [
        f"class {number}: {before} → {now}"
        for number, (before, now) in enumerate(zip(old, new, strict=True))
        if before != now
    ]
    more = [f"{len(renamed) - _MOST_CLASSES} more classes"] if len(renamed) > _MOST_CLASSES else []
    return renamed[:_MOST_CLASSES] + more


def _numbers(shown: Sequence[float], other: Sequence[float]) -> str:
    """A list of numbers with as few digits as show how it differs from the other one."""
    short, short_other = ([f"{value:.4g}" for value in values] for values in (shown, other))
    return f"[{', '.join(map(repr, shown) if short == short_other else short)}]"
