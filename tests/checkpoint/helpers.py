"""State to save, and ways to change a saved checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import writer as checkpoint_writer

PARTS = ("model", "optimizer")
FILES = ("model.safetensors", "optimizer.safetensors", "rank_00000.safetensors", "state.json", "manifest.json")


def state(seed: int = 0) -> dict[str, Any]:
    """A strategy's state with tensors of many dtypes and layouts."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tied = nn.Parameter(values(4, 4))
    return {
        "model": {
            "inner.weight": tied,
            "outer.weight": tied,
            "kernel": values(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
            "half": values(3).bfloat16(),
            "double": values(3).double(),
            "count": torch.tensor(7),
            "mask": torch.tensor([True, False]),
            "empty": torch.empty(0, 3),
            "part": values(6)[::2],
        },
        "optimizer": {"kernel/exp_avg": values(4, 3, 2, 2), "kernel/step": torch.tensor(5.0)},
        "compressor": {"residual/kernel": values(4, 3, 2, 2), "step": torch.tensor(40)},
        "local": {"drift/part": values(6)},
        "layout": {"strategy": "single", "world_size": 1, "mesh": {}},
        "scalars": {
            "optimizer_name": "adam",
            "optimizer": {"kernel/generation": 3},
            "precision": {"scale": 65536.0, "good_steps": 7},
        },
    }


def progress(step: int) -> dict[str, Any]:
    """A trainer's position."""
    counts = {"step": step, "epoch": 0, "epoch_samples": step, "samples": 10 * step}
    scores = {"train_loss": None, "val_accuracy": None, "best_accuracy": None, "best_step": None}
    return {**counts, "epoch_sums": [0.1 + 0.2, 3.0, 1e-300], **scores}


def part_of(tensors: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """The tensors of one stage of a pipeline."""
    names = sorted(tensors)
    return {name: tensors[name] for name in names[len(names) * rank // ranks : len(names) * (rank + 1) // ranks]}


def state_of_rank(rank: int, ranks: int, split: bool) -> dict[str, Any]:
    """The state that a rank saves. The model is whole on rank 0, or split among all; rank 1 has no state of its own."""
    whole = state()
    held = {part: part_of(whole[part], *((rank, ranks) if split else (rank > 0, 1))) for part in ("model", "optimizer")}
    own = {} if rank == 1 else {"residual/weight": torch.full((2,), float(rank))}
    layout = {"strategy": "ddp", "world_size": ranks, "mesh": {"data": ranks}}
    return {**whole, **held, "compressor": own, "local": {}, "layout": layout}


def save_steps(folder: Path, *numbers: int) -> list[Path]:
    return [checkpoint_writer.save(folder, state(), progress(number)) for number in numbers]


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replaces a file's content and its entry in the manifest, as an attacker would."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
