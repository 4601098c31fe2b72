"""Tar shards: their samples are read where they lie, in the order that all ranks share, and bad ones are refused."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distrain.data import decode_processes, shard_index
from distrain.data.base import Splits
from distrain.data.batch import Batch
from distrain.data.loader import Loader
from distrain.errors import ConfigError, SampleError
from tests.data.helpers import augment, source

#: A member of a tar: its name, its content and fields of its header.
Member = tuple[str, bytes, dict[str, Any]]


def picture(value: int, kind: str = "PNG") -> bytes:
    """An image file, 5x4, whose pixels all have one value."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 4, 3), value, dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def member(name: str, content: bytes | str | int = b"", **fields: Any) -> Member:
    return name, content if isinstance(content, bytes) else str(content).encode(), fields


def write_tar(path: Path, members: Sequence[Member], form: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content, fields in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for key, value in fields.items():
                setattr(entry, key, value)
            archive.addfile(entry, io.BytesIO(content))


def sample(number: int, label: str | int) -> list[Member]:
    """A sample whose pixels are its number; float times make extended headers, as WebDataset's own writer does."""
    key = f"some/folder/{number:04}"
    return [member(f"{key}.png", picture(number), mtime=1.5), member(f"{key}.cls", label, mtime=1.5)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven shards of 3 to 9 samples to train on, 42 in all, and two to test on; sample i is of class i modulo 3."""
    root = tmp_path_factory.mktemp("shards")
    number = 0
    for shard, count in enumerate((3, 4, 5, 6, 7, 8, 9)):
        numbers = range(number, number + count)
        write_tar(root / f"train-{shard:03}.tar", [part for i in numbers for part in sample(i, i % 3)])
        number += count
    for shard in range(2):
        numbers = range(100 + 4 * shard, 104 + 4 * shard)
        write_tar(root / f"test-{shard:03}.tar", [part for i in numbers for part in sample(i, i % 3)])
    return root


#: Statistics that need not be measured, so that no images are decoded for it.
GIVEN = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
MEASURED = {"mean": None, "std": None}


def configured(root: Path | str | None, **changes: Any) -> Any:
    settings = {"height": 5, "width": 4, "workers": 0, "val_fraction": 0.0, "shuffle_shards": 2, **GIVEN}
    return source("webdataset", root=None if root is None else str(root), **{**settings, **changes})


def load(root: Path, **changes: Any) -> Splits:
    loaded: Splits = configured(root, **changes).load()
    return loaded


def values(splits: Splits, part: str = "train") -> list[int]:
    split = getattr(splits, part)
    images: Tensor = split.read(torch.arange(len(split))).images
    return images[:, 0, 0, 0].tolist()


def test_samples_classes_and_statistics_are_those_of_the_tars(shards: Path) -> None:
    splits = load(shards, **MEASURED)
    assert splits.spec.classes == ("0", "1", "2")
    assert splits.notes == ("9 shards, 50 images in 3 classes (train 42, test 8)",)
    assert values(splits) == list(range(42))
    assert values(splits, "test") == list(range(100, 108))
    assert splits.train.targets.tolist() == [i % 3 for i in range(42)]
    assert splits.mean == pytest.approx([np.mean(range(42)) / 255] * 3)
    assert splits.std == pytest.approx([np.std(range(42)) / 255] * 3)
    held_out = load(shards, val_fraction=0.25)
    assert (len(held_out.train), len(held_out.val)) == (32, 10)
    assert sorted(values(held_out) + values(held_out, "val")) == list(range(42))


def batches(splits: Splits, shard: tuple[int, int] = (0, 1), epoch: int = 0, consumed: int = 0) -> list[Batch]:
    settings: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "seed": 3, "shuffle": True}
    layout, changes = torch.contiguous_format, augment(flip=True, crop_padding=1)
    loader = Loader(
        splits.train,
        batch_size=8,
        shard=shard,
        mean=splits.mean,
        std=splits.std,
        memory_format=layout,
        augment=changes,
        **settings,
    )
    return list(loader.epoch(epoch, consumed))


def joined(*shares: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and positions of an epoch, from the shares of all ranks."""
    parts = [batch for together in zip(*shares, strict=True) for batch in together]
    inputs, targets = torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts])
    return inputs, targets, torch.cat([part.indices for part in parts])


@pytest.mark.parametrize("epoch", [0, 1])
def test_any_number_of_ranks_sees_the_same_samples_in_the_same_order_also_after_a_resume(
    shards: Path, epoch: int
) -> None:
    splits = load(shards, limit=37)
    expected = joined(batches(splits, epoch=epoch))
    assert sorted(expected[2].tolist()) == list(range(37))
    for ranks in (1, 2, 3):
        together = joined(*(batches(splits, (rank, ranks), epoch) for rank in range(ranks)))
        assert all(map(torch.equal, together, expected)), ranks
        for consumed in (8, 13):
            resumed = joined(*(batches(splits, (rank, ranks), epoch, consumed) for rank in range(ranks)))
            assert all(torch.equal(part, whole[consumed:]) for part, whole in zip(resumed, expected, strict=True))
    assert not torch.equal(joined(batches(splits, epoch=2))[2], expected[2])


def test_an_epoch_reads_from_few_shards_at_a_time(shards: Path) -> None:
    positions = joined(batches(load(shards)))[2]
    ends = torch.tensor([3, 7, 12, 18, 25, 33, 42])
    shard = torch.searchsorted(ends, positions, right=True)
    runs = [set(shard[: i + 1].tolist()) & set(shard[i:].tolist()) for i in range(len(shard))]
    assert max(map(len, runs)) <= 2
    mixed = joined(batches(load(shards, shuffle_shards=None)))[2]
    assert not mixed.equal(positions)


@pytest.mark.parametrize(
    ("patterns", "counts"),
    [
        ({"train": "train-{000..006}.tar"}, (42, 0)),
        ({"train": "train-{000..002}.tar", "test": "train-{003,005}.tar"}, (12, 14)),
        ({"train": "*n-00{0..1}.tar", "val": "train-002.tar", "test": "test-*.tar"}, (7, 8)),
        ({"train": "t{rain-00{0,1},est-000}.tar"}, (11, 0)),
        ({"train": "*.tar"}, (50, 0)),
    ],
)
def test_patterns_name_the_shards_of_each_part(shards: Path, patterns: dict[str, str], counts: tuple[int, int]) -> None:
    splits = load(shards, test_fraction=0.2, **patterns)
    if not counts[1]:
        assert len(splits.train) + len(splits.test) == counts[0]
    else:
        assert (len(splits.train), len(splits.test)) == counts


def test_parts_may_be_folders_and_labels_names(tmp_path: Path) -> None:
    for part, numbers in (("Train", range(6)), ("validation", range(10, 14)), ("test", range(20, 23))):
        names = ("fin", "Ähre", "fin")
        members = [
            part
            for i in numbers
            for part in (
                member(f"./{i}.JPG", picture(8 * i, "JPEG")),
                member(f"./{i}.json", f'{{"caption": "x", "kind": "{names[i % 3]}"}}'),
                member(f"./{i}.txt", f"a caption of {i}"),
                member(f"./._{i}.JPG", b"of macOS"),
            )
        ]
        write_tar(tmp_path / part / "0.tar", [member("./", type=tarfile.DIRTYPE), *members], tarfile.GNU_FORMAT)
    splits = load(tmp_path, label_ext="json", label_key="kind", channels=1, mean=[0.5], std=[0.25])
    assert splits.spec.classes == ("fin", "Ähre")
    assert splits.val.targets.tolist() == [1, 0, 0, 1]
    assert splits.notes == (
        "3 shards, 13 images in 2 classes (train 6, val 4, test 3); left out: 26 (.txt 13, hidden 13)",
    )
    assert values(splits) == [8 * i for i in range(6)]
    turned = load(tmp_path, label_ext="json", label_key="kind", classes=["Ähre", "fin", "owl"])
    assert turned.spec.classes == ("Ähre", "fin", "owl")
    assert turned.val.targets.tolist() == [0, 1, 1, 0]


def test_the_index_is_kept_and_made_anew_for_a_changed_shard(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir() if path.is_dir())

    configured(shards, cache=str(tmp_path)).describe()
    (name,) = names()
    (tmp_path / name / "samples.i64").write_bytes(np.arange(200, dtype=np.int64).tobytes())
    assert configured(shards, cache=str(tmp_path)).describe().classes == ("0", "1", "2")
    assert names() == [name]
    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "_build", lambda *arguments: pytest.fail("looked through again"))
        configured(shards, cache=str(tmp_path)).describe()
    os.utime(shards / "train-000.tar", ns=(0, 12345))
    configured(shards, cache=str(tmp_path)).describe()
    assert len(names()) == 2


def test_with_given_statistics_no_image_is_decoded_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [part for i in range(20) for part in sample(i, i % 2)]
    write_tar(tmp_path / "a.tar", [*members, member("x.png", b"no image"), member("x.cls", 1)])
    with pytest.raises(ConfigError, match=r"a\.tar, image at byte \d+ can't be decoded .*data\.on_error=skip"):
        load(tmp_path, **MEASURED)
    assert len(load(tmp_path, on_error="skip", test_fraction=0.5).train) == 10
    monkeypatch.setattr(decode_processes, "run", lambda *arguments: pytest.fail("decoded"))
    splits = load(tmp_path)
    assert splits.mean == (0.5, 0.5, 0.5)
    with pytest.raises(SampleError, match=r"a\.tar, image at byte \d+ can't be read .*cannot identify image file"):
        values(splits, "train") + values(splits, "test")


def test_shards_that_are_sorted_by_class_are_named(tmp_path: Path) -> None:
    for shard in range(6):
        numbers = range(10 * shard, 10 * shard + 10)
        write_tar(tmp_path / f"{shard}.tar", [part for i in numbers for part in sample(i, f"class {shard}")])
    hint = (
        "shards hold 1.0 of 6 classes each: sorted by class? data.shuffle_shards=null mixes all of them in each epoch"
    )
    assert load(tmp_path).notes[1].startswith(hint)
    assert len(load(tmp_path, shuffle_shards=None).notes) == 1


def damaged(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """Writes a sound shard with some bytes changed."""

    def write(path: Path) -> None:
        write_tar(path, [*sample(0, 0), *sample(1, 1)], tarfile.USTAR_FORMAT)
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(bytes(content))

    return write


def of(*members: Member) -> Callable[[Path], None]:
    return lambda path: write_tar(path, [*sample(0, 0), *sample(1, 1), *members])


def cut(size: int) -> Callable[[Path], None]:
    def change(content: bytearray) -> None:
        del content[size:]

    return damaged(change)


def header(**fields: Any) -> Callable[[Path], None]:
    """A tar with one header that says what it likes."""

    def write(path: Path) -> None:
        entry = tarfile.TarInfo("x.png")
        for key, value in fields.items():
            setattr(entry, key, value)
        path.write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(10240))

    return write


PNG = picture(1)
WRONG_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "is compressed, .*: gunzip train.tar"),
    "zstd": (lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(99)), "is compressed, .*: unzstd train.tar"),
    "no tar": (lambda path: path.write_bytes(b"hello" * 999), "is no tar or is damaged"),
    "empty": (lambda path: path.write_bytes(b""), r"is no tar or is damaged \(empty file\)"),
    "no samples": (lambda path: write_tar(path, []), "holds no samples"),
    "symbolic link": (of(member("x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")), "x.png is a link"),
    "hard link": (of(member("x.png", type=tarfile.LNKTYPE, linkname="some/folder/0000.png")), "x.png is a link"),
    "device": (of(member("x.png", type=tarfile.CHRTYPE)), "x.png is no file; only regular files are read"),
    "pipe": (of(member("x.png", type=tarfile.FIFOTYPE)), "x.png is no file"),
    "absolute path": (of(member("/x.png", PNG)), "/x.png is a path to outside of the tar"),
    "path upwards": (of(member("../x.png", PNG)), "../x.png is a path to outside of the tar"),
    "pickle": (of(member("x.pyd", b"x")), "x.pyd is a pickle, which could run code; write labels as .cls or .json"),
    "extended header": (of(member("x.png", PNG, pax_headers={"a": "b" * 99999})), "member's header of 100352 bytes"),
    "long name": (header(name="x" * 50_000), "a member's header of 50176 bytes"),
    "chain of headers": (
        lambda path: path.write_bytes(
            b"".join([tarfile.TarInfo._create_header({"name": "x", "type": b"x"}, 0, "ascii", "strict")] * 3000)  # type: ignore[attr-defined]
            + bytes(10240)
        ),
        "is no tar or is damaged .*recursion",
    ),
    "huge": (header(size=8 << 30), "is truncated: it ends within x.png"),
    "negative size": (header(size=-512), "x.png has an impossible size or place"),
    "sparse": (header(size=8 << 30, type=tarfile.GNUTYPE_SPARSE), "x.png is a sparse file"),
    "cut in a member": (cut(520), "is truncated: it ends within some/folder/0000.png"),
    "cut after a member": (cut(4096), "is truncated: the mark of a tar's end is missing"),
    "flipped bit": (damaged(lambda content: content.__setitem__(2048, 1)), "is damaged: there is no member at byte"),
    "joined by cat": (damaged(lambda content: content.extend(content[:])), "goes on after its end"),
    "twice": (of(*sample(1, 1)), "0001.png appears twice"),
    "two images": (of(member("some/folder/0001.jpg", PNG)), "belong to one sample; data.image_ext says"),
    "no image": (of(member("x.cls", 1)), r"x has no image \(\.jpg, \.jpeg, "),
    "image by another ending": (of(member("x.cls", 1), member("x.left.png", PNG)), "data.image_ext=left.png would"),
    "no label": (of(member("x.png", PNG)), r"x has no label \(\.cls\)"),
    "label by another ending": (of(member("x.png", PNG), member("x.id", 1)), "data.label_ext=id would name another"),
    "empty label": (of(member("x.png", PNG), member("x.cls")), "x.cls is empty; a label is a class number or a name"),
    "negative label": (of(member("x.png", PNG), member("x.cls", -1)), "x.cls holds -1; classes are numbered from 0"),
    "binary label": (of(member("x.png", PNG), member("x.cls", b"\xff")), "x.cls is not UTF-8 text"),
    "long label": (of(member("x.png", PNG), member("x.cls", "x" * 5000)), "a label has at most 4096"),
    "label out of range": (
        of(member("x.png", PNG), member("x.cls", 10**6)),
        "a label is 1000000, and there are 100,000",
    ),
}


@pytest.mark.parametrize("name", WRONG_SHARDS)
def test_a_shard_that_cant_be_used_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    write, problem = WRONG_SHARDS[name]
    write(tmp_path / "train.tar")
    with pytest.raises(ConfigError) as caught:
        configured(tmp_path).describe()
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"data.root={tmp_path}: ")
    assert re.search(problem, line), line


JSON = '{"label": %s}'


@pytest.mark.parametrize(
    ("changes", "label", "problem"),
    [
        ({"root": "s3://bucket/data"}, 0, r"data\.root=s3:/+bucket/data: is not a folder; only local files are read"),
        ({"root": "SHARDS/train.tar"}, 0, r"is not a folder; data\.root=.* data\.train='\"train\.tar\"' names shards"),
        ({"root": None}, 0, r"data\.root=null: needs the folder"),
        ({"train": "train-{000..001}.tar"}, 0, "train-000.tar and 1 more are not in"),
        ({"train": "x-*.tar"}, 0, r"data\.train=x-\*\.tar: no file in .* matches"),
        ({"train": "../x.tar"}, 0, r"is a pattern of files in data\.root"),
        ({"train": "pipe:cat x.tar"}, 0, r"is a pattern of files in data\.root"),
        ({"train": "x{1..0}.tar"}, 0, r"\{1\.\.0\} is empty"),
        ({"train": "x{1.tar"}, 0, r"braces hold a range or a list"),
        ({"train": "x{0..99999999}.tar"}, 0, "stands for more than 100,000 files"),
        ({"test": "train.tar"}, 0, r"data\.train=null: names the shards to train on"),
        ({"train": "train.tar", "test": "*.tar"}, 0, "train.tar would belong to train and to test"),
        ({"image_ext": ".jpg"}, 0, r"data\.image_ext=\.jpg: .* without a dot.*did you mean jpg\?"),
        ({"classes": ["a", "b"]}, 2, "a label is 2, and there are the 2 names of data.classes, from 0"),
        ({"classes": ["a", "a"]}, 1, r"data\.classes=\['a', 'a'\]: a appears twice"),
        ({"classes": ["a", "b"]}, "c", r"data\.classes=.*: lacks the label c"),
        ({}, 0, "all samples are of one class, 0"),
        (
            {"label_ext": "json", "label_key": "kind"},
            JSON % 1,
            "9.json has no key kind, only label; data.label_key names",
        ),
        ({"label_ext": "json"}, JSON % "[1]", "label is neither a class number nor a name"),
        ({"label_ext": "json"}, JSON % "true", "label is neither a class number nor a name"),
        ({"label_ext": "json"}, "[" * 99999, "is not JSON"),
        ({"label_ext": "txt"}, "caption", r"each of the 3 labels is another text.*are they class names\?"),
    ],
)
def test_settings_and_labels_that_cant_be_used_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], label: str | int, problem: str
) -> None:
    ending = changes.get("label_ext", "cls")
    labels: list[str | int] = [f"{label} {i}" for i in range(3)] if ending == "txt" else [label] * 3
    if isinstance(label, int) and label:
        labels = [0, 1, label]
    names = ("9", "8", "7")
    pairs = [(member(f"{names[i]}.png", PNG), member(f"{names[i]}.{ending}", labels[i])) for i in range(3)]
    members = [part for pair in pairs for part in pair]
    write_tar(tmp_path / "train.tar", members)
    root = changes.get("root", "SHARDS")
    others = {key: value for key, value in changes.items() if key != "root"}
    with pytest.raises(ConfigError) as caught:
        configured(root and root.replace("SHARDS", str(tmp_path)), **others).describe()
    line = str(caught.value)
    assert "\n" not in line
    assert re.search(problem, line), line


def test_a_class_that_is_tested_but_not_trained_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [*sample(0, "a"), *sample(1, "b")])
    write_tar(tmp_path / "test-0.tar", [*sample(0, "a"), *sample(1, "c")])
    with pytest.raises(ConfigError, match="no sample to train on has the label c, which is in other shards"):
        configured(tmp_path).describe()


def test_a_shard_that_is_a_link_to_outside_is_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").symlink_to(shards / "train-000.tar")
    with pytest.raises(ConfigError, match=r"train-0\.tar is a link to outside of the folder"):
        configured(tmp_path).describe()


def test_compressed_shards_in_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no \.tar files, directly or in train/"):
        configured(tmp_path).describe()
    (tmp_path / "train-0.tar.gz").touch()
    with pytest.raises(ConfigError, match=r"train-0\.tar\.gz is compressed.*gunzip train-0\.tar\.gz"):
        configured(tmp_path).describe()
