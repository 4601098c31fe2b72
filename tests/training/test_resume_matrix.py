"""A run goes on from the checkpoint of any layout in any other one, in the middle of an epoch, as if undisturbed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import checkpoint_path, checkpoints_folder
from tests.harness import run_ranks
from tests.runs import ALL_AUGMENTATIONS, relative_difference, small, train_on_rank

#: Two stages, each of them divided among two ranks.
MESH = ("strategy.mesh.tensor=2", "strategy.mesh.pipeline=2", "strategy.schedule=gpipe", "strategy.microbatches=1")
#: Number of ranks, and how they divide the work. A line more is a layout more.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ()),
    "ddp": (3, ("strategy=ddp",)),
    "pipeline": (2, ("strategy=pipeline", "strategy.schedule=gpipe", "strategy.microbatches=1")),
    "fsdp": (4, ("strategy=fsdp", "strategy.block_mb=1e-3")),
    # Averages are of whole parameters, which its ranks don't have.
    "mesh": (4, ("strategy=mesh", *MESH, "trainer.ema.decay=null")),
    "tensor_parallel": (2, ("strategy=tensor_parallel", "trainer.ema.decay=null")),
}
#: An epoch is 13 steps, the last of seven images.
SAVED, STEPS = 18, 30
SHARED = (
    *("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=batch"),
    *ALL_AUGMENTATIONS,
    *("data.augment.repeats=1", "data.train_size=127", "data.val_fraction=0", "scheduler=constant"),
    *("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.01", "trainer.ema.decay=0.9"),
    *("trainer.epochs=100", f"trainer.max_steps={STEPS}", f"checkpoint.every_steps={SAVED}", "checkpoint.keep=9"),
    # Sizes of buckets, which depend on timings, change the order of additions.
    "trainer.deterministic=true",
)


def saved(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint that every layout saves, and the averages where the run keeps them."""
    state = checkpoint_reader.load(checkpoint_path(checkpoints_folder(run), step))[0]
    parts = ("model", "optimizer", "average")
    return {f"{part}/{key}": tensor for part in parts for key, tensor in state.get(part, {}).items()}


def train(layout: str, folder: Path, *options: str) -> dict[str, Tensor]:
    """Trains to the end and returns what was saved last."""
    ranks, strategy = LAYOUTS[layout]
    run_ranks(train_on_rank, ranks, small(*SHARED, *strategy, *options, f"run_dir={folder}"), timeout=300)
    return saved(folder, STEPS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each layout its run and what it saved last."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {layout: (folder / layout, train(layout, folder / layout)) for layout in LAYOUTS}


# In the suite, `test_resume.py` goes through all of these layouts in one chain.
@pytest.mark.soak
@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_any_layout_goes_on_from_any_other(
    source: str, target: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    folder, last = undisturbed[source]
    found = train(target, tmp_path, f"resume={checkpoint_path(checkpoints_folder(folder), SAVED)}")
    # An average goes on where the run before kept one and this one does.
    averaged = all(any(name.startswith("average/") for name in run) for run in (last, found))
    ours, serial = (
        {name: tensor for name, tensor in run.items() if averaged or not name.startswith("average/")}
        for run in (found, undisturbed["single"][1])
    )
    assert relative_difference(ours, serial) <= 1e-5
    if source == target:
        assert found.keys() == last.keys()
        assert all(torch.equal(tensor, last[name]) for name, tensor in found.items())
