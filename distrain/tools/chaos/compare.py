"""Whether two runs came out as one: every tensor of the last checkpoint, bit for bit, and the same logged steps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader


def differences(reference: Path, other: Path) -> list[str]:
    """How a run's outcome differs from the undisturbed one's; empty where it doesn't.

    Args:
        reference: The undisturbed run's folder.
        other: The other's.
    """
    mine, theirs = (
        checkpoint_reader.newest_valid(checkpoint_format.checkpoints_folder(run)) for run in (reference, other)
    )
    if mine is None or theirs is None:
        return ["there is no checkpoint"]
    if mine.name != theirs.name:
        return [f"ended with {theirs.name}, not with {mine.name}"]
    (expected, _), (found, _) = checkpoint_reader.load(mine), checkpoint_reader.load(theirs)
    problems = []
    for part in ("model", "optimizer"):
        names = [
            name
            for name in sorted({*expected[part], *found[part]})
            if not _same(expected[part].get(name), found[part].get(name))
        ]
        if names:
            problems.append(f"{len(names)} tensors of the {part} differ, {names[0]} among them")
    return problems


def log_differences(reference: Path, other: Path, *, lossy: bool) -> list[str]:
    """How a run's rows of metrics.jsonl differ from the undisturbed one's, by their steps and epochs.

    Args:
        reference: The undisturbed run's folder.
        other: The other's.
        lossy: There was a time when nothing could be written, so rows may be missing, or cut.
    """
    expected, found = _rows(reference / "metrics.jsonl"), _rows(other / "metrics.jsonl")
    doubled = sorted(row for row, times in (Counter(found) - Counter(expected)).items() if not lossy or row in expected)
    lost = [] if lossy else sorted(Counter(expected) - Counter(found))
    return [
        f"metrics.jsonl has {len(rows)} rows {what}, {' '.join(map(str, rows[0]))} first"
        for rows, what in ((doubled, "too many"), (lost, "too few"))
        if rows
    ]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes: a NaN equals itself, and zero differs from minus zero.
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _rows(path: Path) -> list[tuple[str, int]]:
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            found.append((str(row["kind"]), int(row["step"])))
        except (ValueError, KeyError, TypeError):
            found.append(("unreadable row", 0))
    return found
