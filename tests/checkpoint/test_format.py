"""Checkpoints come back as they were saved, or are refused by the name of the file that is not; no code is read."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import retention as checkpoint_retention
from distrain.checkpoint import safetensors_writer
from distrain.checkpoint import writer as checkpoint_writer
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.checkpoint.writer import SaveFailed
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests import runs
from tests.harness import run_ranks

PARTS = ("model", "optimizer")
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
    return checkpoint_writer.save(tmp_path, state(), progress(40))


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
    found, where = checkpoint_reader.load(saved)
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


def part_of(tensors: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What a stage of a pipeline holds."""
    names = sorted(tensors)
    return {name: tensors[name] for name in names[len(names) * rank // ranks : len(names) * (rank + 1) // ranks]}


def state_of_rank(rank: int, ranks: int, split: bool) -> dict[str, Any]:
    """What a rank has to save of a model that is whole on rank 0 or split among all; rank 1 has nothing of its own."""
    whole = state()
    held = {part: part_of(whole[part], *((rank, ranks) if split else (rank > 0, 1))) for part in ("model", "optimizer")}
    own = {} if rank == 1 else {"residual/weight": torch.full((2,), float(rank))}
    layout = {"strategy": "ddp", "world_size": ranks, "mesh": {"data": ranks}}
    return {**whole, **held, "compressor": own, "local": {}, "layout": layout}


def _save_on_rank(folder: Path, split: bool, apart: bool) -> list[list[float]]:
    rank = int(os.environ["RANK"])
    with Runtime(runs.small("strategy=ddp", f"run_dir={folder}"), World.from_environment()) as runtime:
        # Hosts that share no file system have each a folder of their own by the same name.
        mine = folder / (f"host_{rank}" if apart else "shared")
        everyone = runtime.communicator()
        checkpoint_writer.save(mine, state_of_rank(rank, 3, split), progress(5), everyone, runtime.device)
        found, _ = checkpoint_reader.load(folder / ("host_0" if apart else "shared") / "step_00000005")
    expected = state()
    assert all(torch.equal(found[part][name], expected[part][name]) for part in PARTS for name in expected[part])
    return [each["residual/weight"].tolist() if each else [] for each in found["compressor"]]


@pytest.mark.parametrize(("split", "apart"), [(False, False), (True, False), (True, True)])
def test_what_ranks_save_together_comes_back(tmp_path: Path, split: bool, apart: bool) -> None:
    for found in run_ranks(_save_on_rank, 3, tmp_path, split, apart):
        assert found == [[0.0, 0.0], [], [2.0, 2.0]]
    folder = tmp_path / ("host_0" if apart else "shared") / "step_00000005"
    held = [f"{part}_{rank:05d}" for part in PARTS for rank in range(3)] if split else list(PARTS)
    # Three ranks share two optimizer tensors.
    held = [name for name in held if name != "optimizer_00000"]
    names = {f"{name}.safetensors" for name in (*held, "rank_00000", "rank_00002")} | {"manifest.json", "state.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert checkpoint_reader.load_model(folder).keys() == state()["model"].keys()


def test_a_tensor_in_two_files_is_refused(saved: Path) -> None:
    content = (saved / "model.safetensors").read_bytes()
    rewritten(saved, "model_00001.safetensors", content)
    with pytest.raises(DamagedCheckpoint, match=r"model_00001\.safetensors holds .*, which another file holds too"):
        checkpoint_reader.load(saved)


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
    assert list(checkpoint_reader.load(saved)[0]["compressor"]) == [{}]


def test_the_model_can_be_read_alone(saved: Path) -> None:
    model = checkpoint_reader.load_model(saved)
    assert model.keys() == state()["model"].keys()
    assert torch.equal(model["kernel"], state()["model"]["kernel"])


def test_saving_changes_no_tensor_and_keeps_none(tmp_path: Path) -> None:
    given = state()
    folder = checkpoint_writer.save(tmp_path, given, progress(1))
    assert given["model"]["inner.weight"] is given["model"]["outer.weight"]
    assert given["model"]["kernel"].is_contiguous(memory_format=torch.channels_last)
    found, _ = checkpoint_reader.load(folder)
    found["model"]["part"].zero_()
    assert given["model"]["part"].any()


def test_the_same_step_saved_again_replaces_the_first(saved: Path) -> None:
    again = checkpoint_writer.save(saved.parent, state(seed=1), progress(40) | {"epoch": 3})
    assert again == saved
    found, where = checkpoint_reader.load(again)
    assert where["epoch"] == 3
    assert torch.equal(found["model"]["part"], state(seed=1)["model"]["part"])
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


BREAKABLE: dict[str, Any] = {
    "a tensor's file": (safetensors_writer, "write"),
    "state.json": (checkpoint_writer, "to_json"),
    "the folder": (checkpoint_writer, "sync_folder"),
    "its name": (Path, "rename"),
    "a new folder": (Path, "mkdir"),
}


@pytest.mark.parametrize("broken", BREAKABLE)
def test_a_save_that_fails_leaves_the_others_as_they_are(
    saved: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    owner, name = BREAKABLE[broken]
    monkeypatch.setattr(owner, name, full_disk)
    for step in (40, 50):
        with pytest.raises(SaveFailed) as caught:
            checkpoint_writer.save(saved.parent, state(seed=1), progress(step))
        where = f"rank 0 on {socket.gethostname()}: somewhere: No space left on device (ENOSPC)"
        assert str(caught.value) == where
    monkeypatch.undo()
    assert list(saved.parent.iterdir()) == [saved]
    assert torch.equal(checkpoint_reader.load(saved)[0]["model"]["part"], state()["model"]["part"])
    checkpoint_reader.load(checkpoint_writer.save(saved.parent, state(), progress(50)))


def _save_where_one_rank_can_t(folder: Path) -> list[str]:
    rank, said = int(os.environ["RANK"]), []
    with Runtime(runs.small("strategy=ddp", f"run_dir={folder}"), World.from_environment()) as runtime:
        everyone, write = runtime.communicator(), safetensors_writer.write

        def full_disk(path: Path, content: Any) -> safetensors_writer.FileDigest:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

        for faulty in range(2):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(safetensors_writer, "write", full_disk if rank == faulty else write)
                with pytest.raises(SaveFailed) as caught:
                    checkpoint_writer.save(folder / "checkpoints", state_of_rank(rank, 2, True), progress(5), everyone)
            said.append(str(caught.value))
            everyone.barrier()
            assert list((folder / "checkpoints").iterdir()) == []
            everyone.barrier()
        checkpoint_writer.save(folder / "checkpoints", state_of_rank(rank, 2, True), progress(5), everyone)
    return said


def test_what_one_rank_can_t_write_all_ranks_know(tmp_path: Path) -> None:
    first, second = run_ranks(_save_where_one_rank_can_t, 2, tmp_path)
    assert first == second
    for faulty, line in enumerate(first):
        assert line.startswith(f"rank {faulty} on {socket.gethostname()}: {tmp_path}/checkpoints/.step_00000005.")
        assert line.endswith(f"/model_{faulty:05d}.safetensors: Disk quota exceeded (EDQUOT)")
    checkpoint_reader.load(tmp_path / "checkpoints" / "step_00000005")


# --- damage ----------------------------------------------------------------------------------------------------------


def refuses(folder: Path, name: str) -> None:
    for read in (checkpoint_reader.load, checkpoint_reader.load_model, checkpoint_reader.verify):
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
                checkpoint_reader.verify(saved)


def test_any_bit_and_any_cut_of_any_file_is_found_and_the_older_one_used(tmp_path: Path, warnings: list[str]) -> None:
    older = checkpoint_writer.save(tmp_path, state(), progress(40))
    newer = checkpoint_writer.save(tmp_path, {**state(seed=1), "model": {}, "optimizer": {}}, progress(41))
    for part in PARTS:
        # As two stages of a pipeline leave it, where a bit makes one file's name of the other's.
        (newer / f"{part}.safetensors").unlink()
        for rank in range(2):
            name = f"{part}_{rank:05d}.safetensors"
            rewritten(newer, name, b"".join(safetensors_writer.serialize(part_of(state(seed=1)[part], rank, 2))))
    manifest = json.loads((newer / "manifest.json").read_text())
    kept = {name: entry for name, entry in manifest.items() if (newer / name).exists()}
    (newer / "manifest.json").write_text(json.dumps(kept, indent=2))
    checkpoint_reader.load(newer)
    assert checkpoint_reader.newest_valid(tmp_path) == newer
    draw = random.Random(0)
    files = sorted(newer.iterdir())
    assert len(files) == 7
    for attempt in range(210):
        file = files[attempt % len(files)]
        content = file.read_bytes()
        place = draw.randrange(len(content))
        flipped = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
        file.write_bytes(flipped if attempt // len(files) % 2 else content[:place])
        warnings.clear()
        assert checkpoint_reader.newest_valid(tmp_path) == older, (file, place, attempt)
        assert len(warnings) == 1
        assert str(newer) in warnings[0]
        file.write_bytes(content)
    assert checkpoint_reader.newest_valid(tmp_path) == newer


@pytest.mark.parametrize("content", ["[]", "3", '{"state.json": 3}', '{"state.json": {"bytes": "x"}}', "{}"])
def test_a_manifest_of_another_shape_is_named(saved: Path, content: str) -> None:
    (saved / "manifest.json").write_text(content)
    refuses(saved, "manifest.json")


@pytest.mark.parametrize("content", ["[]", "{}", '{"scalars": {}}', '{"scalars": 3, "progress": {}}', "\xff"])
def test_a_state_of_another_shape_is_named(saved: Path, content: str) -> None:
    rewritten(saved, "state.json", content.encode("latin-1"))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json can't be read"):
        checkpoint_reader.load(saved)


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
        checkpoint_reader.load(saved)[0]["compressor"][0]
    assert not mark.exists()
    # It would have run.
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


# --- which one -------------------------------------------------------------------------------------------------------


def steps(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_format.list_checkpoints(folder)]


def several(folder: Path, *numbers: int) -> list[Path]:
    return [checkpoint_writer.save(folder, state(), progress(number)) for number in numbers]


def test_checkpoints_are_listed_by_step_and_nothing_else_is(tmp_path: Path) -> None:
    several(tmp_path, 200, 30, 1000)
    (tmp_path / ".step_00002000.123").mkdir()
    (tmp_path / "step_00003000.old").mkdir()
    (tmp_path / "step_00004000").write_text("no folder")
    assert steps(tmp_path) == ["step_00000030", "step_00000200", "step_00001000"]
    assert checkpoint_format.list_checkpoints(tmp_path / "nowhere") == []


def test_the_newest_valid_one_is_found_and_damaged_ones_are_named(tmp_path: Path, warnings: list[str]) -> None:
    oldest, middle, newest = several(tmp_path, 10, 20, 30)
    assert checkpoint_reader.newest_valid(tmp_path) == newest
    assert warnings == []
    (newest / "manifest.json").unlink()
    (middle / "model.safetensors").write_bytes(b"")
    assert checkpoint_reader.newest_valid(tmp_path) == oldest
    assert len(warnings) == 2
    assert str(newest / "manifest.json") in warnings[0]
    assert str(middle / "model.safetensors") in warnings[1]
    (oldest / "state.json").unlink()
    assert checkpoint_reader.newest_valid(tmp_path) is None
    assert checkpoint_reader.newest_valid(tmp_path / "nowhere") is None


def test_a_half_written_one_is_never_taken(saved: Path, warnings: list[str]) -> None:
    half = saved.with_name(".step_00000050.4711")
    half.mkdir()
    (half / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    assert checkpoint_reader.newest_valid(saved.parent) == saved
    assert warnings == []


@pytest.mark.parametrize(
    ("keep", "best", "newest", "left"),
    [
        (1, None, 50, [50]),
        (2, None, 50, [40, 50]),
        (2, 20, 50, [20, 40, 50]),
        (2, 50, 50, [40, 50]),
        (2, 99, 50, [40, 50]),
        (5, 10, 50, [10, 20, 30, 40, 50]),
        (9, None, 50, [10, 20, 30, 40, 50]),
        # The run went back to an earlier one; what comes after it would be gone on from.
        (1, None, 30, [30]),
        (2, 10, 40, [10, 30, 40]),
    ],
)
def test_pruning_keeps_the_newest_and_the_best(
    tmp_path: Path, keep: int, best: int | None, newest: int, left: list[int]
) -> None:
    for number in (10, 20, 30, 40, 50):
        (tmp_path / f"step_{number:08d}").mkdir()
    checkpoint_retention.prune(tmp_path, keep, best, newest)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step_{number:08d}" for number in left]


def test_what_can_t_be_removed_is_said_and_does_no_harm(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    several(tmp_path, 10, 20)

    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(shutil, "rmtree", read_only)
    checkpoint_retention.prune(tmp_path, 1, None, 20)
    assert len(warnings) == 1
    assert "can't remove an old checkpoint" in warnings[0]
    assert steps(tmp_path) == ["step_00000020"]


# --- what dead processes leave ---------------------------------------------------------------------------------------


def _save_and_be_killed(folder: Path, after: int) -> None:
    """Saves step 40 again, then 50, and drops 40; is killed before the given call that changes the disk."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    changing = ((Path, ("mkdir", "open", "rename")), (os, ("fsync", "unlink", "rmdir")))
    for owner, names in changing:
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))
    for step in (40, 50):
        checkpoint_writer.save(folder, state(seed=step), progress(step))
    checkpoint_retention.prune(folder, 1, None, 50)


def _kill_at_every_moment(folder: Path) -> int:
    """Saves in one process after another, each killed a little later, until one is through; returns how many were."""
    for after in range(1000):
        shutil.copytree(folder / "original", folder / str(after))
        child = os.fork()
        if not child:
            try:
                _save_and_be_killed(folder / str(after), after)
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            return after
    return -1


def test_killed_at_any_moment_nothing_is_lost_and_nothing_half_is_believed(tmp_path: Path) -> None:
    checkpoint_writer.save(tmp_path / "original", state(seed=39), progress(40))
    (killed,) = run_ranks(_kill_at_every_moment, 1, tmp_path)
    assert killed > 30
    found = []
    for after in range(killed):
        folder = tmp_path / str(after)
        assert all(checkpoint_reader.is_valid(path) for path in checkpoint_format.list_checkpoints(folder))
        checkpoint_retention.remove_leftovers(folder)
        assert not list(folder.glob(".*"))
        newest = checkpoint_reader.newest_valid(folder)
        assert newest is not None
        held, where = checkpoint_reader.load(newest)
        # Of step 40 it is the old one or the new one.
        (seed,) = [seed for seed in (39, 40, 50) if torch.equal(held["model"]["part"], state(seed)["model"]["part"])]
        assert where["step"] == max(seed, 40)
        found.append(seed)
    assert found == sorted(found)
    assert set(found) == {39, 40, 50}


def _dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["", ".replaced", ".removed"])
def test_only_what_nothing_uses_is_cleared_away(tmp_path: Path, kind: str) -> None:
    here = socket.gethostname()
    used = [f".step_00000001.{here}.{os.getppid()}{kind}", f".step_00000001.another.host.{_dead_process()}{kind}"]
    left = [f".step_00000001.{here}.{_dead_process()}{kind}", f".step_00000001.{here}.{os.getpid()}{kind}"]
    old = [f".step_00000002.another.host.7{kind}", f".step_00000002.{here}.{os.getppid()}{kind}"]
    others = [".step_x", ".notes", "step_00000003"]
    for name in (*used, *left, *old, *others):
        (tmp_path / name).mkdir()
    for name in old:
        os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    checkpoint_retention.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*used, *others}
    checkpoint_retention.remove_leftovers(tmp_path / "nowhere")


def test_an_old_checkpoint_that_made_room_comes_back(saved: Path) -> None:
    saved.rename(saved.with_name(f".{saved.name}.{socket.gethostname()}.{_dead_process()}.replaced"))
    checkpoint_retention.remove_leftovers(saved.parent)
    assert list(saved.parent.iterdir()) == [saved]
    checkpoint_reader.load(saved)
