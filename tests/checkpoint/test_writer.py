"""What is saved comes back as it was; a save that fails changes nothing and is known to all ranks."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import safetensors_writer
from distrain.checkpoint import writer as checkpoint_writer
from distrain.checkpoint.writer import SaveFailed
from distrain.files.contained_folder import ContainedFolder
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests import runs
from tests.checkpoint.helpers import FILES, PARTS, progress, state, state_of_rank
from tests.harness import run_ranks


def test_loaded_state_equals_the_saved_state(saved: Path) -> None:
    expected = state()
    loaded, position = checkpoint_reader.load(saved)
    assert position == progress(40)
    assert loaded["scalars"] == expected["scalars"]
    assert loaded["layout"] == expected["layout"]
    assert len(loaded["compressor"]) == len(loaded["local"]) == 1
    parts = {part: loaded[part] for part in ("model", "optimizer")}
    own = {part: loaded[part][0] for part in ("compressor", "local")}
    for part, tensors in {**parts, **own}.items():
        assert tensors.keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            assert tensors[name].dtype == tensor.dtype, name
            assert torch.equal(tensors[name], tensor), name


def test_checkpoint_is_a_folder_of_files_named_by_the_step(saved: Path) -> None:
    assert saved.name == "step_00000040"
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def _save_on_rank(folder: Path, split: bool, separate_folders: bool) -> list[list[float]]:
    rank = int(os.environ["RANK"])
    with Runtime(runs.small("strategy=ddp", f"run_dir={folder}"), World.from_environment()) as runtime:
        # Hosts without a shared file system: each has its own folder of the same name.
        own_folder = folder / (f"host_{rank}" if separate_folders else "shared")
        communicator = runtime.communicator()
        checkpoint_writer.save(own_folder, state_of_rank(rank, 3, split), progress(5), communicator, runtime.device)
        loaded, _ = checkpoint_reader.load(folder / ("host_0" if separate_folders else "shared") / "step_00000005")
    expected = state()
    assert all(torch.equal(loaded[part][name], expected[part][name]) for part in PARTS for name in expected[part])
    return [each["residual/weight"].tolist() if each else [] for each in loaded["compressor"]]


@pytest.mark.parametrize(("split", "separate_folders"), [(False, False), (True, False), (True, True)])
def test_state_saved_by_several_ranks_is_loaded_whole(tmp_path: Path, split: bool, separate_folders: bool) -> None:
    for residuals in run_ranks(_save_on_rank, 3, tmp_path, split, separate_folders):
        assert residuals == [[0.0, 0.0], [], [2.0, 2.0]]
    folder = tmp_path / ("host_0" if separate_folders else "shared") / "step_00000005"
    parts = [f"{part}_{rank:05d}" for part in PARTS for rank in range(3)] if split else list(PARTS)
    # There are two optimizer tensors for three ranks.
    parts = [name for name in parts if name != "optimizer_00000"]
    names = {f"{name}.safetensors" for name in (*parts, "rank_00000", "rank_00002")} | {
        "manifest.json",
        "state.json",
    }
    assert {path.name for path in folder.iterdir()} == names
    assert checkpoint_reader.load_model(folder).keys() == state()["model"].keys()


def test_saving_neither_changes_nor_keeps_tensors(tmp_path: Path) -> None:
    original = state()
    folder = checkpoint_writer.save(tmp_path, original, progress(1))
    assert original["model"]["inner.weight"] is original["model"]["outer.weight"]
    assert original["model"]["kernel"].is_contiguous(memory_format=torch.channels_last)
    loaded, _ = checkpoint_reader.load(folder)
    loaded["model"]["part"].zero_()
    assert original["model"]["part"].any()


def test_saving_a_step_again_replaces_its_checkpoint(saved: Path) -> None:
    again = checkpoint_writer.save(saved.parent, state(seed=1), progress(40) | {"epoch": 3})
    assert again == saved
    loaded, position = checkpoint_reader.load(again)
    assert position["epoch"] == 3
    assert torch.equal(loaded["model"]["part"], state(seed=1)["model"]["part"])
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


BREAKABLE: dict[str, Any] = {
    "a tensor's file": (safetensors_writer, "write"),
    "state.json": (checkpoint_writer, "to_json"),
    "the folder": (ContainedFolder, "sync"),
    "its name": (ContainedFolder, "rename"),
    "a new folder": (ContainedFolder, "make_folder"),
}


@pytest.mark.parametrize("broken", BREAKABLE)
def test_failed_save_leaves_other_checkpoints_unchanged(
    saved: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    owner, name = BREAKABLE[broken]
    monkeypatch.setattr(owner, name, full_disk)
    for step in (40, 50):
        with pytest.raises(SaveFailed) as caught:
            checkpoint_writer.save(saved.parent, state(seed=1), progress(step))
        message = f"rank 0 on {socket.gethostname()}: somewhere: No space left on device (ENOSPC)"
        assert str(caught.value) == message
    monkeypatch.undo()
    assert list(saved.parent.iterdir()) == [saved]
    assert torch.equal(checkpoint_reader.load(saved)[0]["model"]["part"], state()["model"]["part"])
    checkpoint_reader.load(checkpoint_writer.save(saved.parent, state(), progress(50)))


def _save_with_one_failing_rank(folder: Path) -> list[str]:
    rank, messages, checkpoints = int(os.environ["RANK"]), [], folder / "checkpoints"
    rank_state = state_of_rank(rank, 2, split=True)
    with Runtime(runs.small("strategy=ddp", f"run_dir={folder}"), World.from_environment()) as runtime:
        communicator, write = runtime.communicator(), safetensors_writer.write

        def full_disk(folder: ContainedFolder, name: str, content: Any) -> safetensors_writer.FileDigest:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(folder.path / name))

        for faulty in range(2):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(safetensors_writer, "write", full_disk if rank == faulty else write)
                with pytest.raises(SaveFailed) as caught:
                    checkpoint_writer.save(
                        folder / "checkpoints", state_of_rank(rank, 2, True), progress(5), communicator
                    )
            messages.append(str(caught.value))
            communicator.barrier()
            assert [path.name for path in checkpoints.iterdir()] == [".claim"]
            communicator.barrier()
        checkpoint_writer.save(checkpoints, rank_state, progress(5), communicator)
    return messages


def test_write_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(_save_with_one_failing_rank, 2, tmp_path)
    assert first == second
    for faulty, line in enumerate(first):
        assert line.startswith(f"rank {faulty} on {socket.gethostname()}: {tmp_path}/checkpoints/.step_00000005.")
        assert line.endswith(f"/model_{faulty:05d}.safetensors: Disk quota exceeded (EDQUOT)")
    checkpoint_reader.load(tmp_path / "checkpoints" / "step_00000005")
