"""Images that stay encoded until they are needed are the same samples as decoded ones."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distrain.data.base import Splits
from distrain.data.byte_ranges import ByteRanges
from distrain.data.items import Items
from distrain.errors import ConfigError, SampleError
from tests.data.helpers import source
from tests.runs import compose, train_on_rank


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images of several formats, modes and sizes."""
    root = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    kinds = [("jpg", "RGB"), ("png", "RGBA"), ("png", "L"), ("jpg", "CMYK"), ("tiff", "RGB"), ("webp", "RGB")]
    for part, count in (("train", 9), ("test", 3)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                suffix, mode = kinds[number % len(kinds)]
                pixels = draws.integers(0, 256, (17 + number, 90 - 5 * number, 3), dtype=np.uint8)
                exif = Image.Exif()
                exif[0x0112] = 6 if suffix == "jpg" else 1
                Image.fromarray(pixels).convert(mode).save(root / part / name / f"{number}.{suffix}", exif=exif)
    return root


def load(root: Path, **changes: Any) -> Splits:
    settings = {"height": 8, "width": 12, "workers": 0, "val_fraction": 0.2}
    return source("image_folder", root=str(root), **{**settings, **changes}).load()


@pytest.mark.parametrize("channels", [1, 3])
def test_encoded_images_are_the_same_samples_as_pixels(photos: Path, channels: int) -> None:
    pixels, encoded = (load(photos, channels=channels, cache_format=name) for name in ("pixels", "encoded"))
    assert (encoded.mean, encoded.std, encoded.notes) == (pixels.mean, pixels.std, pixels.notes)
    assert not encoded.resident
    for part in ("train", "val", "test"):
        kept, expected = getattr(encoded, part), getattr(pixels, part)
        assert isinstance(kept, Items)
        read = kept.read(torch.arange(len(kept)))
        assert read.images.equal(expected.images)
        assert read.targets.equal(expected.targets)


def test_training_on_encoded_images_ends_with_the_same_parameters_bit_for_bit(photos: Path, tmp_path: Path) -> None:
    models = {}
    for name in ("pixels", "encoded"):
        keys = (f"data.root={photos}", f"data.cache_format={name}", "data.workers=0", f"run_dir={tmp_path / name}")
        sizes = ("data.height=8", "data.width=8", "data.batch_size=5", "data.augment.crop_padding=1")
        quiet = ("logger=none", "trainer.progress=off", "runtime.threads=1", "trainer.epochs=2", "model=simple_cnn")
        models[name] = train_on_rank(compose("data=image_folder", *keys, *sizes, *quiet))["model"]
    assert models["pixels"].keys() == models["encoded"].keys()
    for key, tensor in models["pixels"].items():
        assert tensor.equal(models["encoded"][key]), key


def test_a_cache_of_encoded_images_is_as_large_as_the_files_and_checked(photos: Path, tmp_path: Path) -> None:
    def first_image() -> torch.Tensor:
        train = load(photos, cache=str(tmp_path), cache_format="encoded", val_fraction=0.0).train
        return train.read(torch.arange(1)).images

    expected = first_image()
    (file,) = tmp_path.glob("*/encoded.bin")
    assert file.stat().st_size == sum(path.stat().st_size for path in photos.glob("t*/*/*"))
    made = file.stat().st_mtime_ns
    assert first_image().equal(expected)
    assert file.stat().st_mtime_ns == made
    file.write_bytes(file.read_bytes()[:-8])
    assert first_image().equal(expected)
    sizes = np.fromfile(file.parent / "sizes.i64", dtype=np.int64)
    sizes[::-1].tofile(file.parent / "sizes.i64")
    assert first_image().equal(expected)
    assert file.stat().st_mtime_ns > made


def test_an_encoded_image_that_cant_be_decoded_is_named(photos: Path, tmp_path: Path) -> None:
    broken = photos / "test" / "a" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 no image")
    try:
        with pytest.raises(ConfigError, match=r"test/a/broken\.jpg can't be decoded .*; data\.on_error=skip"):
            load(photos, cache=str(tmp_path), cache_format="encoded")
        skipped = load(photos, cache=str(tmp_path), cache_format="encoded", on_error="skip")
        assert len(skipped.test) == 6
        assert len(skipped.test.read(torch.arange(6))) == 6
    finally:
        broken.unlink()
    # What is damaged later is found when it is read.
    (file,) = tmp_path.glob("*/encoded.bin")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(SampleError, match=r"encoded\.bin, image at byte \d+ can't be read .*cannot identify image"):
        skipped.test.read(torch.arange(6))


def test_pieces_of_files_are_opened_when_they_are_read_and_few_stay_open(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(100)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(number) + b"piece %d" % number)
    pieces = ByteRanges(paths, np.arange(100), np.arange(100), [len(b"piece %d" % number) for number in range(100)])
    assert [pieces.read(number) for number in range(100)] == [b"piece %d" % number for number in range(100)]
    assert len(pieces._open) == 64
    with contextlib.closing(pickle.loads(pickle.dumps(pieces))) as copy:
        assert not copy._open
        assert copy.read(99) == b"piece 99"
    pieces.close()
    paths[7].write_bytes(b"short")
    with pytest.raises(ValueError, match="ends after 7 bytes"):
        pieces.read(7)
