"""A file that claims to be large is refused before memory is allocated."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import writer as checkpoint_writer
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.cli import hydra_entry, predict
from distrain.cli.run_folder import RunFolder
from distrain.config.load import load_settings
from distrain.data import decode
from distrain.data.decode import DecodeError
from distrain.tools.predicting.images import find_images
from tests.checkpoint.helpers import progress, rewrite, state
from tests.runs import CONF
from tests.security.helpers import (
    load_tree,
    one_line_error,
)


def with_header(header: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + bytes(64)


def tensor_at(*offsets: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def of_tensors(**tensors: dict[str, Any]) -> bytes:
    return with_header(json.dumps(tensors).encode())


@pytest.mark.parametrize(
    "content",
    [
        with_header(b"{}", 1 << 60),
        with_header(b"{}", (1 << 64) - 1),
        with_header(b"{" * 100_000),
        of_tensors(a=tensor_at(0, 16), b=tensor_at(8, 24)),
        of_tensors(a=tensor_at(0, 1 << 40, shape=(1 << 38,))),
        of_tensors(a=tensor_at(16, 0)),
        of_tensors(a=tensor_at(0, 16, shape=(1 << 62, 4))),
        of_tensors(a=tensor_at(0, 16, shape=(-4,))),
        of_tensors(a=tensor_at(0, 16, dtype="OBJECT")),
        b"",
        b"\x80",
    ],
)
def test_tensor_file_with_false_claims_counts_as_damaged(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors is not a safetensors file"):
        checkpoint_reader._load_tensors(file)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], rows: bytes = b"") -> bytes:
    """A PNG file of 8-bit grey whose header claims this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = b"".join(chunk(*each) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def bomb(kind: str) -> bytes:
    if kind == "claims":
        return png(50_000, 50_000)
    if kind == "small file":
        return png(9_500, 9_500, rows=bytes(9_501 * 9_500))
    if kind == "truncated":
        return png(64, 64, rows=os.urandom(65 * 64))[:2000]
    if kind == "text":
        return png(4, 4, (b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000))), rows=bytes(20))
    whole = io.BytesIO()
    Image.new("RGB", (8, 8)).save(whole, format="GIF")
    return whole.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("claims", "2500000000 pixels"),
        ("small file", "9500x9500 are more than 89478485 pixels"),
        ("text", "Decompressed data too large"),
        ("truncated", "image file"),
        ("gif", "cannot identify"),
    ],
)
def test_image_bomb_is_refused_by_name(tmp_path: Path, kind: str, message: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(bomb(kind))
    refused = one_line_error(lambda: decode.decode(file, 4, 4, 3), DecodeError)
    assert refused.startswith(f"{file}: ")
    assert message in refused


def test_file_larger_than_any_image_is_not_decoded(tree: Path, run: Path) -> None:
    file = tree / "a" / "1.png"
    with file.open("r+b") as sparse:
        sparse.truncate(decode.LARGEST_FILE + 1)
    assert f"{file} can't be decoded (has more than 1073741824 bytes)" in one_line_error(lambda: load_tree(tree))
    assert f"input={file}: can't be decoded (has more than 1073741824" in one_line_error(lambda: predict_one(run, file))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_large_exif_is_ignored(tmp_path: Path) -> None:
    entries = struct.pack(">H", 0xFFFF) + b"\x01\x12\x00\x03\x00\x00\x00\x01\xff\xff\x00\x00" * 5000
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + entries
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", exif=exif[:65_000])
    (tmp_path / "b.png").write_bytes(png(4, 4, (b"eXIf", exif[6:] * 300), rows=bytes(20)))
    for name in ("a.jpg", "b.png"):
        assert decode.decode(tmp_path / name, 4, 4, 3).shape == (3, 4, 4)


def test_pipe_among_images_does_not_block(tree: Path, run: Path) -> None:
    os.mkfifo(tree / "a" / "9.png")
    assert find_images(str(tree)) == [f"{tree}/{name}" for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png")]
    load_tree(tree)


def test_run_folder_can_not_claim_huge_images(run: Path) -> None:
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**data, "height": 10**6, "width": 10**6}))
    assert "data.json has images of more than" in one_line_error(lambda: RunFolder.open(str(run)))


def predict_one(run: Path, file: Path) -> None:
    overrides = [f"run={run}", f"input={file}", f"output={run}/out.json", "on_error=stop"]
    composed = hydra_entry.compose(CONF, "predict", overrides)
    predict.run(load_settings(predict.PredictSettings, composed))


def seconds_to_refuse(checkpoint: Path, message: str) -> float:
    start = time.process_time()
    refused = one_line_error(lambda: checkpoint_reader.verify(checkpoint), DamagedCheckpoint)
    assert message in refused
    return time.process_time() - start


def claim(checkpoint: Path, name: str, size: int) -> None:
    """Writes a file's size into the manifest, with a checksum that only reading the file can refute."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[name] = {"bytes": size, "sha256": "0" * 64}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "another"])
def test_a_checkpoint_of_holes_is_refused_before_it_is_hashed(tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_writer.save(tmp_path, state(), progress(40))
    with (checkpoint / name).open("ab") as file:
        file.truncate(4 << 40)
    claim(checkpoint, name, 4 << 40)
    assert seconds_to_refuse(checkpoint, f"{name} has {4 << 40} bytes, more than this host's memory") < 5


def test_numbers_of_tensors_and_files_are_bounded(tmp_path: Path) -> None:
    checkpoint = checkpoint_writer.save(tmp_path, state(), progress(40))
    rewrite(checkpoint, "model.safetensors", of_tensors(**{f"{number}": tensor_at(0, 0) for number in range(300_000)}))
    assert seconds_to_refuse(checkpoint, "more tensors than any run writes") < 5
    checkpoint = checkpoint_writer.save(tmp_path, state(), progress(41))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    empty = {"bytes": 0, "sha256": "0" * 64}
    manifest |= {f"{number}": empty for number in range(300_000)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert seconds_to_refuse(checkpoint, "and no run writes more than 65536") < 5
