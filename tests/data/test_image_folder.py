"""A tree of image files becomes splits and classes, is decoded once into a cache, and bad trees are refused."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from distrain.data import cache_folder, image_cache
from distrain.data.base import Splits
from distrain.data.build_folder import locked_build_folder
from distrain.errors import ConfigError
from tests.data.helpers import images_of, source, write_image
from tests.harness import CONTEXT, HANG_SECONDS


def load(root: Path, **changes: object) -> Splits:
    return source("image_folder", root=str(root), height=5, width=4, **{"workers": 1, **changes}).load()


def values(images: torch.Tensor) -> list[int]:
    """Value of each image's pixels, which must all be equal."""
    assert images.flatten(1).amin(1).equal(images.flatten(1).amax(1))
    return images[:, 0, 0, 0].tolist()


def caches(root: Path) -> list[Path]:
    return sorted(path for path in (root / ".distrain-cache").iterdir() if not path.name.startswith("."))


def test_folders_determine_splits_and_classes(tree: Path) -> None:
    splits = load(tree, workers=2)
    assert splits.spec.classes == ("a", "b")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (14, 2, 8)
    assert splits.resident
    assert values(images_of(splits.test)) == [0, 10, 20, 30, 100, 110, 120, 130]
    assert splits.test.targets.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    all_values = values(images_of(splits.train)) + values(images_of(splits.val))
    assert sorted(all_values) == [*range(0, 80, 10), *range(100, 180, 10)]
    assert [int(value >= 100) for value in values(images_of(splits.train))] == splits.train.targets.tolist()


def test_a_val_folder_is_the_validation_split(tree: Path) -> None:
    write_image(tree / "val" / "b" / "x.png", np.full((5, 4, 3), 222, dtype=np.uint8))
    splits = load(tree)
    assert (len(splits.train), values(images_of(splits.val)), splits.val.targets.tolist()) == (16, [222], [1])


def test_classes_directly_below_the_root_get_a_test_split(tree: Path) -> None:
    splits = load(tree / "train", test_fraction=0.25, val_fraction=0.0)
    assert splits.spec.classes == ("a", "b")
    assert (len(splits.train), len(splits.test)) == (12, 4)
    assert sorted(values(images_of(splits.train)) + values(images_of(splits.test))) == [
        *range(0, 80, 10),
        *range(100, 180, 10),
    ]
    # The cache, which is now below the root, is not taken for a class.
    assert load(tree / "train", test_fraction=0.25).test.targets.equal(splits.test.targets)


def test_images_above_the_memory_limit_are_memory_mapped(tree: Path) -> None:
    resident, mapped = load(tree), load(tree, memory_limit_mb=0)
    assert not mapped.resident
    assert (mapped.mean, mapped.std) == (resident.mean, resident.std)
    for name in ("train", "val", "test"):
        actual, expected = getattr(mapped, name), getattr(resident, name)
        assert actual.rows is not None
        assert actual.pick(torch.arange(len(actual))).equal(expected.images)
        assert actual.targets.equal(expected.targets)


def test_statistics_are_those_of_the_training_images(tree: Path) -> None:
    splits = load(tree)
    pixels = images_of(splits.train).double() / 255
    assert splits.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert splits.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-12)


def test_images_are_decoded_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(tree)
    monkeypatch.setattr(image_cache, "_build", lambda *arguments: pytest.fail("decoded again"))
    assert images_of(load(tree).train).equal(images_of(first.train))


def test_a_changed_file_or_size_gets_a_new_cache(tree: Path) -> None:
    load(tree)
    assert len(caches(tree)) == 1
    load(tree, channels=1)
    assert len(caches(tree)) == 2
    write_image(tree / "test" / "a" / "0.png", np.full((5, 4, 3), 99, dtype=np.uint8))
    assert values(images_of(load(tree).test))[0] == 99
    assert len(caches(tree)) == 3
    # A new modification time counts as a change, even if the bytes are the same.
    os.utime(tree / "test" / "a" / "1.png", ns=(0, 12345))
    load(tree)
    assert len(caches(tree)) == 4


def test_a_cache_stays_valid_when_its_tree_is_moved(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tree)
    moved = tree.rename(tree.parent / "moved")
    monkeypatch.setattr(image_cache, "_build", lambda *arguments: pytest.fail("decoded again"))
    assert len(load(moved).train) == 14


def test_a_damaged_cache_is_rebuilt(tree: Path) -> None:
    expected = images_of(load(tree).train)
    path = caches(tree)[0] / "images.u8"
    path.write_bytes(path.read_bytes()[:-1])
    assert images_of(load(tree).train).equal(expected)


def test_a_read_only_tree_uses_the_users_cache(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert len(load(tree).train) == 14
    assert not (tree / ".distrain-cache").exists()
    assert len([path for path in (tmp_path / "user" / "distrain").iterdir() if path.is_dir()]) == 1


def truncate_one_image(tree: Path) -> Path:
    path = tree / "train" / "a" / "3.png"
    path.write_bytes(path.read_bytes()[:40])
    return path


def test_a_broken_image_ends_the_run_with_its_path(tree: Path) -> None:
    path = truncate_one_image(tree)
    with pytest.raises(ConfigError) as caught:
        load(tree)
    assert str(path) in str(caught.value)
    assert "data.on_error=skip" in str(caught.value)
    assert caches(tree) == []


def test_broken_images_are_skipped_and_counted(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    truncate_one_image(tree)
    (tree / "test" / "b" / "9.jpg").write_bytes(b"not an image")
    for _ in range(2):  # first decoded, then read from the cache
        caplog.clear()
        splits = load(tree, on_error="skip", val_fraction=0.0)
        assert "skipped 2 of 25 images" in caplog.text
        assert values(images_of(splits.train)) == [0, 10, 20, 40, 50, 60, 70, *range(100, 180, 10)]
        assert len(splits.test) == 8


def test_links_to_outside_of_the_root_are_not_followed(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(tmp_path / "outside" / "secret.png", np.full((5, 4, 3), 1, dtype=np.uint8))
    (tree / "test" / "a" / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (tree / "train" / "c").symlink_to(tmp_path / "outside")
    (tree / "test" / "a" / "inside.png").symlink_to(tree / "test" / "b" / "0.png")
    splits = load(tree)
    assert splits.spec.classes == ("a", "b")
    assert values(images_of(splits.test))[:5] == [0, 10, 20, 30, 100]
    assert "ignoring 1 symbolic links" in caplog.text


def test_hidden_files_are_ignored_and_other_types_are_counted(tree: Path) -> None:
    (tree / "train" / "a" / ".hidden.png").write_text("x")
    (tree / "train" / "list.csv").write_text("x")
    assert load(tree).notes == ("24 files, 24 images in 2 classes (train 16, test 8)",)
    for name in ("notes.txt", "Thumbs.db", "other.TXT", "README"):
        (tree / "train" / "a" / name).write_text("x")
    splits = load(tree, val_fraction=0.0)
    assert len(splits.train) == 16
    (note,) = splits.notes
    assert note == "28 files, 24 images in 2 classes (train 16, test 8); left out: 4 (.txt 2, no ending 1, .db 1)"


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".tiff", ".tif", ".JPEG", ".PNG"])
def test_images_in_subfolders_and_of_other_formats_are_taken(tree: Path, suffix: str) -> None:
    for place in ("train/a/2024/spring", "train/a/2025", "test/b/x"):
        write_image(tree / place / f"more{suffix}", np.full((5, 4, 3), 60, dtype=np.uint8))
    splits = load(tree, val_fraction=0.0)
    assert (len(splits.train), len(splits.test)) == (18, 9)
    assert splits.notes == ("27 files, 27 images in 2 classes (train 18, test 9)",)


def test_a_link_to_a_folder_further_up_ends(tree: Path) -> None:
    (tree / "train" / "a" / "again").symlink_to(tree / "train")
    assert len(load(tree, val_fraction=0.0).train) == 16


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "valid", "test"),
        ("Train", "Validation", "Test"),
        ("training", "VAL", "testing"),
        ("TRAINING", "VALID", "TESTING"),
        ("train", "validation", None),
        ("Training", None, "test"),
    ],
)
def test_parts_have_the_usual_names_in_any_case(tree: Path, train: str, val: str | None, test: str | None) -> None:
    images = np.full((5, 4, 3), 222, dtype=np.uint8)
    (tree / "train").rename(tree / "renamed")
    (tree / "renamed").rename(tree / train)
    if test is None:
        shutil.rmtree(tree / "test")
    else:
        (tree / "test").rename(tree / "renamed")
        (tree / "renamed").rename(tree / test)
    if val is not None:
        write_image(tree / val / "b" / "x.png", images)
    splits = load(tree)
    if val is not None:
        assert values(images_of(splits.val)) == [222]
    assert len(splits.test) == (8 if test else 2)
    assert len(splits.train) + len(splits.val) == (16 if test else 14) + (val is not None)


def test_parts_that_cant_be_told_apart_are_refused(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refusal() -> str:
        with pytest.raises(ConfigError) as caught:
            source("image_folder", root=str(tree)).describe()
        return str(caught.value)

    (tree / "valid").mkdir()
    (tree / "Validation").mkdir()
    assert "both Validation and valid could be the val images; rename or remove one" in refusal()
    (tree / "valid").rmdir()
    (tree / "Validation").rename(tree / "extra")
    assert source("image_folder", root=str(tree)).describe().classes == ("a", "b")
    assert "ignoring the folders beside train in" in caplog.text
    assert "extra" in caplog.text
    (tree / "extra").rmdir()
    shutil.rmtree(tree / "train")
    (tree / "Val").mkdir()
    assert "has Val and test but no folder of training images (train or training); the folder must hold" in refusal()
    (tree / "Val").rmdir()
    assert "has test but no folder of training images" in refusal()


def test_classes_may_have_names_of_parts(tmp_path: Path) -> None:
    for name in ("valid", "invalid", "test"):
        for number in range(6):
            write_image(tmp_path / "tree" / name / f"{number}.png", np.full((5, 4, 3), number, dtype=np.uint8))
    assert load(tmp_path / "tree").spec.classes == ("invalid", "test", "valid")


def test_classes_too_small_to_be_split_are_named(tree: Path) -> None:
    for number in range(2):
        write_image(tree / "train" / "c" / f"{number}.png", np.full((5, 4, 3), 1, dtype=np.uint8))
    write_image(tree / "train" / "d" / "0.png", np.full((5, 4, 3), 1, dtype=np.uint8))
    assert load(tree).notes[1:] == ("classes with too few images to be in every part: d (1)",)
    whole = load(tree / "train", test_fraction=0.25)
    assert whole.notes[1:] == ("classes with too few images to be in every part: c (2), d (1)",)


def test_invalid_folders_are_refused_before_decoding(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root=.*nowhere: is not a folder"):
        source("image_folder", root=str(tmp_path / "nowhere")).describe()
    with pytest.raises(ConfigError, match=r"data\.root=null: needs the folder"):
        source("image_folder", root=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="two or more classes"):
        source("image_folder", root=str(tmp_path / "empty")).describe()
    (tree / "test" / "zebra").mkdir()
    with pytest.raises(ConfigError, match="test has a class without training images: zebra"):
        source("image_folder", root=str(tree)).describe()


def test_a_class_without_images_is_refused(tree: Path) -> None:
    (tree / "train" / "c").mkdir()
    with pytest.raises(
        ConfigError, match=r"train/c has no image files \(\.jpg, .*\); the folder must hold train/CLASS/"
    ):
        load(tree)


def test_too_little_disk_space_is_refused_before_decoding(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tree)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ConfigError, match=r"data\.cache=.*: the cache needs .* MiB, and only 0 MiB are free"):
        load(tree)


@pytest.mark.parametrize(
    ("root_mode", "cache_mode", "folder", "file"),
    [
        (0o755, 0o755, 0o755, 0o644),
        (0o750, 0o755, 0o750, 0o640),
        (0o700, 0o755, 0o700, 0o600),
        (0o755, 0o777, 0o700, 0o600),
        (0o755, 0o1777, 0o700, 0o600),
        (0o700, 0o700, 0o700, 0o600),
    ],
)
def test_a_cache_is_readable_by_those_who_may_read_the_images(
    tree: Path, tmp_path: Path, root_mode: int, cache_mode: int, folder: int, file: int
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(cache_mode)
    tree.chmod(root_mode)
    old = os.umask(0o022)
    try:
        load(tree, cache=str(cache))
    finally:
        os.umask(old)
    (built,) = (path for path in cache.iterdir() if path.is_dir())
    modes = {path.name: path.stat().st_mode & 0o777 for path in built.iterdir()}
    assert built.stat().st_mode & 0o777 == folder
    assert modes == dict.fromkeys(("images.u8", "moments.i64", "meta.json"), file)


@pytest.mark.parametrize("shared", [True, False])
def test_another_users_cache_is_trusted_only_where_not_everybody_can_write(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    load(tree, cache=str(cache))
    if shared:
        cache.chmod(0o1777)
    (built,) = (path for path in cache.iterdir() if path.is_dir())
    lstat = Path.lstat

    def of_another_user(path: Path) -> os.stat_result:
        fields = list(lstat(path))
        fields[4] = os.getuid() + 1 if path == built else fields[4]
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "lstat", of_another_user)
    if not shared:
        assert len(load(tree, cache=str(cache)).train) == 14
        return
    with pytest.raises(ConfigError, match=r"data\.cache=.*belongs to another user \(uid \d+\).*name another one"):
        load(tree, cache=str(cache))


@pytest.mark.parametrize("choice", ["image_folder", "cifar10"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_data_that_cant_be_read_are_refused_with_their_key(
    tree: Path, monkeypatch: pytest.MonkeyPatch, choice: str, code: int
) -> None:
    def fail(path: Path, **options: object) -> os.stat_result:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "stat", fail)
    size = {"height": 5, "width": 4} if choice == "image_folder" else {}
    with pytest.raises(ConfigError, match=rf"^data\.root=.*can't be read \({os.strerror(code)}\)"):
        source(choice, root=str(tree), **size).describe()


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"])
def test_folders_of_operating_systems_are_no_classes_and_their_pictures_no_samples(tree: Path, name: str) -> None:
    expected = images_of(load(tree).train)
    for place in (tree, tree / "train", tree / "train" / "a"):
        write_image(place / name / "thumbnail.png", np.zeros((5, 4, 3), dtype=np.uint8))
    splits = load(tree)
    assert splits.spec.classes == ("a", "b")
    assert images_of(splits.train).equal(expected)


def build(tree: Path, log: Path, finishes: bool = True) -> None:
    """What a job does; one that doesn't finish has written everything and never gives the cache its name."""
    if not finishes:
        setattr(cache_folder, "publish", lambda *_: time.sleep(2 * HANG_SECONDS))  # noqa: B010
    logging.basicConfig(filename=log, level=logging.INFO)
    train = source("image_folder", root=str(tree), height=5, width=4, workers=1).load().train
    logging.info("%d images", len(train))


def start_job(tree: Path, log: Path, finishes: bool = True) -> BaseProcess:
    """A job in a process of its own."""
    job = CONTEXT.Process(target=build, args=(tree, log, finishes))
    job.start()
    return job


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_of_several_jobs_builds_while_the_others_wait(tree: Path, tmp_path: Path) -> None:
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    with locked_build_folder("data.cache", tree / ".distrain-cache"):
        jobs = [start_job(tree, log) for log in logs]
        wait_for(lambda: all(log.exists() and "waiting for another process" in log.read_text() for log in logs))
    for job in jobs:
        job.join(HANG_SECONDS)
        assert job.exitcode == 0
    texts = [log.read_text() for log in logs]
    assert all("14 images" in text for text in texts)
    assert sum("decoding 24 images" in text for text in texts) == 1
    assert len(caches(tree)) == 1
    assert not list((tree / ".distrain-cache").glob(".build-*"))


def test_a_killed_job_leaves_no_cache(tree: Path, tmp_path: Path) -> None:
    # Some are being decoded when the job is killed.
    for i in range(1000):
        os.link(tree / "train" / "a" / "0.png", tree / "train" / "a" / f"copy{i}.png")
    job = start_job(tree, tmp_path / "log", finishes=False)
    wait_for(lambda: list(tree.glob(".distrain-cache/.build-*/cache/images.u8")))
    job.kill()
    job.join()
    assert caches(tree) == []
    assert len(load(tree, val_fraction=0.0).train) == 1016
    assert len(caches(tree)) == 1
    assert not list((tree / ".distrain-cache").glob(".build-*"))
