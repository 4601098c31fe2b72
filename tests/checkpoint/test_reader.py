"""A damaged checkpoint is refused, and the message names the damaged file; no code in a file is run."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import retention as checkpoint_retention
from distrain.checkpoint import safetensors_writer
from distrain.checkpoint import writer as checkpoint_writer
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.files import untrusted
from tests.checkpoint.helpers import FILES, PARTS, part_of, progress, rewrite, save_steps, state


def assert_refused(folder: Path, name: str) -> None:
    """Every way to read the checkpoint raises an error that names the file."""
    for read in (checkpoint_reader.load, checkpoint_reader.load_model, checkpoint_reader.verify):
        with pytest.raises(DamagedCheckpoint) as caught:
            read(folder)
        assert str(folder / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_model_can_be_loaded_without_the_rest(saved: Path) -> None:
    model = checkpoint_reader.load_model(saved)
    assert model.keys() == state()["model"].keys()
    assert torch.equal(model["kernel"], state()["model"]["kernel"])


def test_tensor_in_two_files_is_refused(saved: Path) -> None:
    content = (saved / "model.safetensors").read_bytes()
    rewrite(saved, "model_00001.safetensors", content)
    with pytest.raises(DamagedCheckpoint, match=r"model_00001\.safetensors holds .*, which another file holds too"):
        checkpoint_reader.load(saved)


@pytest.mark.parametrize("name", ["../state.json", "logs/x"])
def test_manifest_with_a_path_outside_the_folder_is_refused(saved: Path, name: str) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest[name] = manifest["state.json"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(saved, "manifest.json")


def test_unlisted_file_is_not_read(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["rank_00000.safetensors"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert list(checkpoint_reader.load(saved)[0]["compressor"]) == [{}]


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert_refused(saved, name)


@pytest.mark.parametrize("name", FILES)
def test_file_that_lost_its_last_byte_is_named(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    # A trailing newline doesn't count, because JSON is valid without it.
    (saved / name).write_bytes(content.rstrip(b"\n")[:-1])
    assert_refused(saved, name)


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_flipped_bit_is_detected(saved: Path, name: str, where: float) -> None:
    content = bytearray((saved / name).read_bytes())
    content[round(where * (len(content) - 1))] ^= 1
    (saved / name).write_bytes(content)
    assert_refused(saved, name)


def test_flipped_bit_anywhere_in_the_manifest_is_detected(saved: Path) -> None:
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


def test_older_checkpoint_is_used_after_any_flipped_bit_or_cut(tmp_path: Path, warnings: list[str]) -> None:
    older = checkpoint_writer.save(tmp_path, state(), progress(40))
    newer = checkpoint_writer.save(tmp_path, {**state(seed=1), "model": {}, "optimizer": {}}, progress(41))
    for part in PARTS:
        # As two stages of a pipeline save it: one flipped bit turns one file's name into the other's.
        (newer / f"{part}.safetensors").unlink()
        for rank in range(2):
            name = f"{part}_{rank:05d}.safetensors"
            rewrite(newer, name, b"".join(safetensors_writer.serialize(part_of(state(seed=1)[part], rank, 2))))
    manifest = json.loads((newer / "manifest.json").read_text())
    present = {name: entry for name, entry in manifest.items() if (newer / name).exists()}
    (newer / "manifest.json").write_text(json.dumps(present, indent=2))
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
def test_manifest_with_wrong_content_is_named(saved: Path, content: str) -> None:
    (saved / "manifest.json").write_text(content)
    assert_refused(saved, "manifest.json")


@pytest.mark.parametrize("content", ["[]", "{}", '{"scalars": {}}', '{"scalars": 3, "progress": {}}', "\xff"])
def test_state_with_wrong_content_is_named(saved: Path, content: str) -> None:
    rewrite(saved, "state.json", content.encode("latin-1"))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        checkpoint_reader.load(saved)


class RunsCodeWhenUnpickled:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("made_by", ["pickle", "torch"])
@pytest.mark.parametrize("name", FILES)
def test_pickle_in_place_of_a_file_is_refused_and_never_run(
    saved: Path, tmp_path: Path, name: str, made_by: str
) -> None:
    mark, planted = tmp_path / "was run", tmp_path / "planted"
    if made_by == "torch":
        torch.save({"weight": RunsCodeWhenUnpickled(mark)}, planted)
    else:
        planted.write_bytes(pickle.dumps(RunsCodeWhenUnpickled(mark)))
    if name == "manifest.json":
        (saved / name).write_bytes(planted.read_bytes())
    else:
        rewrite(saved, name, planted.read_bytes())
    with pytest.raises(DamagedCheckpoint, match=name):
        checkpoint_reader.load(saved)[0]["compressor"][0]
    assert not mark.exists()
    # The code would have run in an unpickler.
    pickle.loads(pickle.dumps(RunsCodeWhenUnpickled(mark)))
    assert mark.exists()


def test_newest_valid_checkpoint_is_used_and_damaged_ones_are_logged(tmp_path: Path, warnings: list[str]) -> None:
    oldest, middle, newest = save_steps(tmp_path, 10, 20, 30)
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


def test_incomplete_checkpoint_is_never_used(saved: Path, warnings: list[str]) -> None:
    incomplete = saved.with_name(".step_00000050.4711")
    incomplete.mkdir()
    (incomplete / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    assert checkpoint_reader.newest_valid(saved.parent) == saved
    assert warnings == []


STRAYS = (
    "step_\N{SUPERSCRIPT TWO}", "step_00000041.bak", "step_-1", "step_1e3", "step_41", "step_0000004a", "step_",
    "step_\N{ARABIC-INDIC DIGIT FOUR}", "step_" + "\N{ARABIC-INDIC DIGIT FOUR}" * 8, "step_00000041 ", "step_+0000041",
    "step_000000041", "Step_00000041", ".step_00000041", ".step_\N{SUPERSCRIPT TWO}.host.7",
    ".step_00000041.host.99999999999999999999", "step_" + "9" * 200,
)  # fmt: skip


def test_stray_names_beside_checkpoints_are_ignored(saved: Path, warnings: list[str]) -> None:
    folder = saved.parent
    for name in STRAYS:
        (folder / name).mkdir()
    (folder / "step_00000042").write_text("a file")
    assert checkpoint_reader.newest_valid(folder) == saved or warnings
    strays = [path for path in checkpoint_format.list_checkpoints(folder) if path != saved]
    # A number of any size is a step, but such a folder holds no checkpoint.
    assert [path.name for path in strays] == ["step_" + "9" * 200]
    checkpoint_retention.remove_leftovers(folder)
    checkpoint_retention.prune(folder, keep=1, best_step=None, newest_step=40)
    assert checkpoint_format.list_checkpoints(folder) == [saved]


def test_checkpoints_are_in_order_of_their_steps(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 7):
        checkpoint_format.checkpoint_path(tmp_path, step).mkdir()
    steps = [checkpoint_format.step_of(path) for path in checkpoint_format.list_checkpoints(tmp_path)]
    assert steps == [7, 99_999_999, 100_000_000]


class FailingFile(io.FileIO):
    """A file whose content the disk no longer gives."""

    error = errno.EIO

    def readinto(self, buffer: Any) -> int:
        raise OSError(self.error, os.strerror(self.error))

    def readall(self) -> bytes:
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN])
@pytest.mark.parametrize("call", ["open", "read", "stat"])
@pytest.mark.parametrize("name", FILES)
def test_older_checkpoint_is_used_if_the_disk_fails(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch, name: str, call: str, code: int
) -> None:
    older, newer = save_steps(tmp_path, 40, 41)
    real_open, real_stat = untrusted.open_regular, Path.stat

    def failing_open(path: Path) -> Any:
        if path != newer / name:
            return real_open(path)
        if call == "open":
            raise OSError(code, os.strerror(code), str(path))
        file = FailingFile(path)
        file.error = code
        return io.BufferedReader(file)

    def failing_stat(path: Path, **options: Any) -> os.stat_result:
        if call == "stat" and path == newer / name:
            raise OSError(code, os.strerror(code), str(path))
        return real_stat(path, **options)

    monkeypatch.setattr(Path, "stat", failing_stat)
    if call != "stat":
        monkeypatch.setattr(untrusted, "open_regular", failing_open)
    assert checkpoint_reader.newest_valid(tmp_path) == older
    assert len(warnings) == 1
    assert str(newer) in warnings[0]
    assert os.strerror(code) in warnings[0]


def test_complete_folder_that_the_disk_does_not_give_is_not_removed(
    saved: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = saved.rename(saved.with_name(".step_00000040.host.1"))
    os.utime(left, (0, 0))

    def failing_open(path: Path) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(untrusted, "open_regular", failing_open)
    checkpoint_retention.remove_leftovers(saved.parent)
    assert "Input/output error" in warnings[0]
    assert (left / "model.safetensors").exists()
