"""Compares two runs: every tensor of the last checkpoint bit for bit, and the logged steps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader


def checkpoint_differences(reference: Path, other: Path) -> list[str]:
    """Describes how a run's last checkpoint differs from the reference run's; empty if they are equal.

    Args:
        reference: The reference run's folder.
        other: The other run's folder.
    """
    expected_path, actual_path = (
        checkpoint_reader.newest_valid(checkpoint_format.checkpoints_folder(run)) for run in (reference, other)
    )
    if expected_path is None or actual_path is None:
        return ["there is no checkpoint"]
    if expected_path.name != actual_path.name:
        return [f"ended with {actual_path.name}, not with {expected_path.name}"]
    (expected, _), (actual, _) = checkpoint_reader.load(expected_path), checkpoint_reader.load(actual_path)
    problems = []
    for part in checkpoint_format.PARTS:
        names = [
            name
            for name in sorted({*expected[part], *actual[part]})
            if not _identical(expected[part].get(name), actual[part].get(name))
        ]
        if names:
            problems.append(f"{len(names)} tensors of the {part} differ, {names[0]} among them")
    return problems


def log_differences(reference: Path, other: Path, *, lossy: bool) -> list[str]:
    """Describes how the rows of a run's metrics.jsonl differ from the reference run's, by kind and step.

    Args:
        reference: The reference run's folder.
        other: The other run's folder.
        lossy: The disk was full for some time, so rows may be missing or truncated.
    """
    expected, actual = _rows(reference / "metrics.jsonl"), _rows(other / "metrics.jsonl")
    surplus = sorted(row for row in Counter(actual) - Counter(expected) if not lossy or row in expected)
    missing = [] if lossy else sorted(Counter(expected) - Counter(actual))
    return [
        f"metrics.jsonl has {len(rows)} rows {amount}, {' '.join(map(str, rows[0]))} first"
        for rows, amount in ((surplus, "too many"), (missing, "too few"))
        if rows
    ]


def _identical(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Compared as bytes, so that a NaN equals itself and zero differs from minus zero.
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _rows(path: Path) -> list[tuple[str, int]]:
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows.append((str(row["kind"]), int(row["step"])))
        except (ValueError, KeyError, TypeError):
            rows.append(("unreadable row", 0))
    return rows
