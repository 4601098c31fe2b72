"""CIFAR-10 is read as its format says, downloaded at most once, and corrupt files or archives are refused."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from distrain.data import cifar10
from distrain.errors import ConfigError
from tests.data.helpers import images_of, source

IMAGES = 20  # per file
NAMES = "\n".join(cifar10.CLASSES) + "\n\n"
BATCHES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "BATCH_IMAGES", IMAGES)


def contents() -> dict[str, bytes]:
    """Small files in the official format: image i of file k has red 20 k + i, green 1 and blue 2."""
    files = {"batches.meta.txt": NAMES.encode()}
    for k, name in enumerate(BATCHES):
        files[name] = b"".join(
            bytes([i % 10]) + bytes([20 * k + i]) * 1024 + b"\1" * 1024 + b"\2" * 1024 for i in range(IMAGES)
        )
    return files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, content in contents().items():
        (folder / name).write_bytes(content)
    return tmp_path / "root"


def serve(monkeypatch: pytest.MonkeyPatch, archive: Path, members: dict[str, bytes | tarfile.TarInfo]) -> None:
    """Makes the download return an archive of these members, with a matching checksum."""
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(cifar10, "URL", archive.as_uri())
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())


def official() -> dict[str, bytes | tarfile.TarInfo]:
    return {f"cifar-10-batches-bin/{name}": content for name, content in contents().items()}


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_pixels_and_labels_are_read_as_the_format_says(root: Path, below: str) -> None:
    data = source("cifar10", root=str(root / below))
    assert data.describe().classes == cifar10.CLASSES
    splits = data.load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (90, 10, 20)
    assert images_of(splits.test).shape == (20, 3, 32, 32)
    assert images_of(splits.test)[:, 0].amax((1, 2)).tolist() == list(range(100, 120))
    assert images_of(splits.test)[:, 1].unique().tolist() == [1]
    assert images_of(splits.test)[:, 2].unique().tolist() == [2]
    assert splits.test.targets.tolist() == [i % 10 for i in range(20)]
    reds = torch.cat((images_of(splits.train), images_of(splits.val)))[:, 0, 0, 0]
    assert reds.sort().values.tolist() == list(range(100))
    assert splits.mean == (0.4914, 0.4822, 0.4465)


def test_missing_files_are_refused_in_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        source("cifar10", root=str(tmp_path)).describe()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"data.root={tmp_path}: lacks cifar-10-batches-bin")
    assert "data.download=true" in message


def test_a_truncated_file_is_refused(root: Path) -> None:
    path = root / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"data_batch_3\.bin has 61455 bytes, not 61460"):
        source("cifar10", root=str(root)).describe()


def test_an_invalid_label_is_refused(root: Path) -> None:
    path = root / "cifar-10-batches-bin" / "test_batch.bin"
    content = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
    content[3073 * 4] = 200
    path.write_bytes(content.tobytes())
    with pytest.raises(ConfigError, match=r"test_batch\.bin is corrupt: record 4 has label 200"):
        source("cifar10", root=str(root)).load()


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"cat\ndog\n", "names 2 classes, not 10"), (b"\x1f\x8b\n" * 10, "isn't text in UTF-8")],
    ids=["too few", "no text"],
)
def test_a_file_without_ten_names_of_classes_is_refused(root: Path, content: bytes, problem: str) -> None:
    (root / "cifar-10-batches-bin" / "batches.meta.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^data\.root: .*batches\.meta\.txt {problem}"):
        source("cifar10", root=str(root)).load()


def test_files_are_downloaded_only_if_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, tmp_path / "a.tar.gz", official() | {"cifar-10-batches-bin/readme.html": b"<html>"})
    root = tmp_path / "new" / "root"
    with pytest.raises(ConfigError):
        source("cifar10", root=str(root)).describe()
    assert not root.exists()
    data = source("cifar10", root=str(root), download=True)
    assert data.describe().classes == cifar10.CLASSES
    assert len(data.load().train) == 90
    assert sorted(path.name for path in root.iterdir()) == [".lock", "cifar-10-batches-bin"]
    assert {path.name: path.read_bytes() for path in (root / "cifar-10-batches-bin").iterdir()} == contents()


def test_concurrent_ranks_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, tmp_path / "a.tar.gz", official())
    downloads: list[Path] = []
    sizes: list[int] = []
    download = cifar10._download_archive

    def counted(archive: Path) -> None:
        downloads.append(archive)
        download(archive)

    monkeypatch.setattr(cifar10, "_download_archive", counted)

    def rank() -> None:
        sizes.append(len(source("cifar10", root=str(tmp_path / "root"), download=True).load().train))

    threads = [threading.Thread(target=rank) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [90] * 4
    assert len(downloads) == 1


def test_an_archive_with_a_wrong_checksum_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, tmp_path / "a.tar.gz", official())
    monkeypatch.setattr(cifar10, "MD5", "0" * 32)
    with pytest.raises(ConfigError, match="not 00000000000000000000000000000000; nothing was unpacked"):
        source("cifar10", root=str(tmp_path / "root"), download=True).load()
    assert [path.name for path in (tmp_path / "root").iterdir()] == [".lock"]


def special(kind: bytes, name: str = "cifar-10-batches-bin/test_batch.bin") -> dict[str, bytes | tarfile.TarInfo]:
    """A link, device or pipe instead of a file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return {name: info}


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        *((special(kind), "not a plain file") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)),
        *((special(kind), "not a plain file") for kind in (tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)),
        (special(tarfile.SYMTYPE, "cifar-10-batches-bin"), "lacks test_batch.bin"),
        ({"cifar-10-batches-bin/./test_batch.bin": b""}, "lacks test_batch.bin"),
        ({"../cifar-10-batches-bin/test_batch.bin": b""}, "lacks test_batch.bin"),
        ({"cifar-10-batches-bin/test_batch.bin": b"x" * (IMAGES * 3073 + 1)}, "not a plain file of the expected size"),
        ({"cifar-10-batches-bin/../test_batch.bin": b""}, "lacks test_batch.bin"),
        ({"/cifar-10-batches-bin/test_batch.bin": b""}, "lacks test_batch.bin"),
    ],
)
def test_unexpected_archive_members_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes | tarfile.TarInfo], problem: str
) -> None:
    good = {name: content for name, content in official().items() if not name.endswith("test_batch.bin")}
    serve(monkeypatch, tmp_path / "a.tar.gz", good | members)
    with pytest.raises(ConfigError, match=problem):
        source("cifar10", root=str(tmp_path / "root"), download=True).load()
    assert [path.name for path in (tmp_path / "root").iterdir()] == [".lock"]


def test_a_failed_download_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "URL", (tmp_path / "nothing.tar.gz").as_uri())
    with pytest.raises(ConfigError, match="can't be downloaded"):
        source("cifar10", root=str(tmp_path / "root"), download=True).load()
