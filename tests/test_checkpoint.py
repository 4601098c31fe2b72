"""Checkpoints come back as they were saved, or are refused by the name of the file that is not; no code is read."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain import checkpoint
from distrain.checkpoint import DamagedCheckpoint
from distrain.runtime import Runtime, World
from tests import runs
from tests.harness import run_ranks

FILES = ("model.safetensors", "optimizer.safetensors", "rank_00000.safetensors", "state.json", "manifest.json")


def state(seed: int = 0) -> dict[str, Any]:
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
        "scalars": {"optimizer": {"kernel/generation": 3}, "precision": {"scale": 65536.0, "good_steps": 7}},
    }


def progress(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 2, "epoch_sums": [0.1 + 0.2, 3.0, 1e-300], "best_accuracy": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path, state(), progress(40))


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Lines(), logging.getLogger("distrain")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def rewritten(folder: Path, name: str, content: bytes) -> None:
    """Puts another content in a file's place, and in the manifest too, as somebody would who means to be believed."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- there and back --------------------------------------------------------------------------------------------------


def test_everything_comes_back_as_it_was(saved: Path) -> None:
    expected = state()
    found, where = checkpoint.load(saved)
    assert where == progress(40)
    assert found["scalars"] == expected["scalars"]
    assert found["layout"] == expected["layout"]
    assert len(found["compressor"]) == len(found["local"]) == 1
    parts = {part: found[part] for part in ("model", "optimizer")}
    own = {part: found[part][0] for part in ("compressor", "local")}
    for part, tensors in {**parts, **own}.items():
        assert tensors.keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            assert tensors[name].dtype == tensor.dtype, name
            assert torch.equal(tensors[name], tensor), name


def test_a_checkpoint_is_plain_files_named_by_the_step(saved: Path) -> None:
    assert saved.name == "step_00000040"
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def _save_on_rank(folder: Path, apart: bool) -> list[list[float]]:
    rank = int(os.environ["RANK"])
    with Runtime(runs.small("strategy=ddp", f"run_dir={folder}"), World.from_environment()) as runtime:
        # Hosts that share no file system have each a folder of their own by the same name.
        mine = folder / (f"host_{rank}" if apart else "shared")
        own = {} if rank == 1 else {"compressor": {"residual/weight": torch.full((2,), float(rank))}}
        layout = {"strategy": "ddp", "world_size": 3, "mesh": {"data": 3}}
        whole = {**state(), "compressor": {}, "local": {}, "layout": layout, **own}
        checkpoint.save(mine, whole, progress(5), runtime.communicator(), runtime.device)
        runtime.communicator().barrier()
        found, _ = checkpoint.load(folder / ("host_0" if apart else "shared") / "step_00000005")
    return [each["residual/weight"].tolist() if each else [] for each in found["compressor"]]


@pytest.mark.parametrize("apart", [False, True], ids=["one file system", "a host each"])
def test_what_each_rank_has_for_itself_comes_back_by_rank(tmp_path: Path, apart: bool) -> None:
    for found in run_ranks(_save_on_rank, 3, tmp_path, apart):
        assert found == [[0.0, 0.0], [], [2.0, 2.0]]


@pytest.mark.parametrize("name", ["../state.json", "logs/x"])
def test_a_manifest_can_t_point_out_of_its_folder(saved: Path, name: str) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest[name] = manifest["state.json"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    refuses(saved, "manifest.json")


def test_a_file_that_the_manifest_doesn_t_list_is_not_read(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["rank_00000.safetensors"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert list(checkpoint.load(saved)[0]["compressor"]) == [{}]


def test_the_model_can_be_read_alone(saved: Path) -> None:
    model = checkpoint.load_model(saved)
    assert model.keys() == state()["model"].keys()
    assert torch.equal(model["kernel"], state()["model"]["kernel"])


def test_saving_changes_no_tensor_and_keeps_none(tmp_path: Path) -> None:
    given = state()
    folder = checkpoint.save(tmp_path, given, progress(1))
    assert given["model"]["inner.weight"] is given["model"]["outer.weight"]
    assert given["model"]["kernel"].is_contiguous(memory_format=torch.channels_last)
    found, _ = checkpoint.load(folder)
    found["model"]["part"].zero_()
    assert given["model"]["part"].any()


def test_the_same_step_saved_again_replaces_the_first(saved: Path) -> None:
    again = checkpoint.save(saved.parent, state(seed=1), progress(40) | {"epoch": 3})
    assert again == saved
    found, where = checkpoint.load(again)
    assert where["epoch"] == 3
    assert torch.equal(found["model"]["part"], state(seed=1)["model"]["part"])
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("broken", ["save_file", "write_json", "_sync"])
def test_a_save_that_fails_leaves_the_others_as_they_are(
    saved: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, broken, full_disk)
    for step in (40, 50):
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(saved.parent, state(seed=1), progress(step))
    monkeypatch.undo()
    assert checkpoint.all_in(saved.parent) == [saved]
    assert torch.equal(checkpoint.load(saved)[0]["model"]["part"], state()["model"]["part"])
    # What is left in the way is no obstacle.
    checkpoint.load(checkpoint.save(saved.parent, state(), progress(50)))


# --- damage ----------------------------------------------------------------------------------------------------------


def refuses(folder: Path, name: str) -> None:
    for read in (checkpoint.load, checkpoint.load_model, checkpoint.verify):
        with pytest.raises(DamagedCheckpoint) as caught:
            read(folder)
        assert str(folder / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    refuses(saved, name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_by_one_byte_is_named(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    # The manifest ends in a newline, which nobody would miss.
    (saved / name).write_bytes(content.rstrip(b"\n")[:-1])
    refuses(saved, name)


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_flipped_bit_is_found(saved: Path, name: str, where: float) -> None:
    content = bytearray((saved / name).read_bytes())
    content[round(where * (len(content) - 1))] ^= 1
    (saved / name).write_bytes(content)
    refuses(saved, name)


def test_one_flipped_bit_anywhere_in_the_manifest_is_found(saved: Path) -> None:
    content = (saved / "manifest.json").read_bytes()
    original = json.loads(content)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        (saved / "manifest.json").write_bytes(flipped)
        try:
            harmless = json.loads(flipped) == original
        except ValueError:
            harmless = False
        if not harmless:
            with pytest.raises(DamagedCheckpoint, match=str(saved)):
                checkpoint.verify(saved)


@pytest.mark.parametrize("content", ["[]", "3", '{"state.json": 3}', '{"state.json": {"bytes": "x"}}', "{}"])
def test_a_manifest_of_another_shape_is_named(saved: Path, content: str) -> None:
    (saved / "manifest.json").write_text(content)
    refuses(saved, "manifest.json")


@pytest.mark.parametrize("content", ["[]", "{}", '{"scalars": {}}', '{"scalars": 3, "progress": {}}', "\xff"])
def test_a_state_of_another_shape_is_named(saved: Path, content: str) -> None:
    rewritten(saved, "state.json", content.encode("latin-1"))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json can't be read"):
        checkpoint.load(saved)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("made_by", ["pickle", "torch"])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_a_file_is_refused_and_never_run(
    saved: Path, tmp_path: Path, name: str, made_by: str
) -> None:
    mark, planted = tmp_path / "was run", tmp_path / "planted"
    if made_by == "torch":
        torch.save({"weight": Bomb(mark)}, planted)
    else:
        planted.write_bytes(pickle.dumps(Bomb(mark)))
    if name == "manifest.json":
        (saved / name).write_bytes(planted.read_bytes())
    else:
        rewritten(saved, name, planted.read_bytes())
    with pytest.raises(DamagedCheckpoint, match=name):
        checkpoint.load(saved)[0]["compressor"][0]
    assert not mark.exists()
    # It would have run.
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


# --- which one -------------------------------------------------------------------------------------------------------


def steps(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.all_in(folder)]


def several(folder: Path, *numbers: int) -> list[Path]:
    return [checkpoint.save(folder, state(), progress(number)) for number in numbers]


def test_checkpoints_are_listed_by_step_and_nothing_else_is(tmp_path: Path) -> None:
    several(tmp_path, 200, 30, 1000)
    (tmp_path / ".step_00002000.123").mkdir()
    (tmp_path / "step_00003000.old").mkdir()
    (tmp_path / "step_00004000").write_text("no folder")
    assert steps(tmp_path) == ["step_00000030", "step_00000200", "step_00001000"]
    assert checkpoint.all_in(tmp_path / "nowhere") == []


def test_the_newest_valid_one_is_found_and_damaged_ones_are_named(tmp_path: Path, warnings: list[str]) -> None:
    oldest, middle, newest = several(tmp_path, 10, 20, 30)
    assert checkpoint.newest_valid(tmp_path) == newest
    assert warnings == []
    (newest / "manifest.json").unlink()
    (middle / "model.safetensors").write_bytes(b"")
    assert checkpoint.newest_valid(tmp_path) == oldest
    assert len(warnings) == 2
    assert str(newest / "manifest.json") in warnings[0]
    assert str(middle / "model.safetensors") in warnings[1]
    (oldest / "state.json").unlink()
    assert checkpoint.newest_valid(tmp_path) is None
    assert checkpoint.newest_valid(tmp_path / "nowhere") is None


def test_a_half_written_one_is_never_taken(saved: Path, warnings: list[str]) -> None:
    half = saved.with_name(".step_00000050.4711")
    half.mkdir()
    (half / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    assert checkpoint.newest_valid(saved.parent) == saved
    assert warnings == []


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, None, [50]),
        (2, None, [40, 50]),
        (2, 20, [20, 40, 50]),
        (2, 50, [40, 50]),
        (2, 99, [40, 50]),
        (5, 10, [10, 20, 30, 40, 50]),
        (9, None, [10, 20, 30, 40, 50]),
    ],
)
def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    for number in (10, 20, 30, 40, 50):
        (tmp_path / f"step_{number:08d}").mkdir()
    checkpoint.prune(tmp_path, keep, best)
    assert steps(tmp_path) == [f"step_{number:08d}" for number in left]
