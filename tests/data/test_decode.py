"""Images are decoded, resized and cropped as documented, and files that are not whole images are refused."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from distrain.data.decode import DecodeError, decode
from tests.data.helpers import ROOT, write_image


def gradient(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rows, columns = np.mgrid[:height, :width]
    return np.stack((rows, columns, rows + columns), axis=2).astype(np.uint8)


def test_an_image_of_the_target_size_is_unchanged(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", gradient(6, 9))
    assert np.array_equal(decode(tmp_path / "a.png", 6, 9, 3), gradient(6, 9).transpose(2, 0, 1))


def test_a_jpeg_is_decoded_as_by_pillow(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    write_image(path, gradient(16, 16))
    assert np.array_equal(decode(path, 16, 16, 3), np.asarray(Image.open(path)).transpose(2, 0, 1))


def test_other_sizes_are_scaled_and_centre_cropped(tmp_path: Path) -> None:
    # Thirds in black, white and black: a square crop keeps the middle third.
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255
    write_image(tmp_path / "wide.png", pixels)
    write_image(tmp_path / "tall.png", pixels.transpose(1, 0, 2).copy())
    for name in ("wide.png", "tall.png"):
        decoded = decode(tmp_path / name, 10, 10, 3)
        assert decoded.shape == (3, 10, 10)
        assert decoded[:, 1:-1, 1:-1].min() == 255


def test_a_large_jpeg_is_reduced_with_small_error(tmp_path: Path) -> None:
    pixels = np.asarray(Image.fromarray(gradient(8, 8) * 16).resize((800, 800), Image.Resampling.BILINEAR))
    write_image(tmp_path / "large.jpg", pixels)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(decode(tmp_path / "large.jpg", 32, 32, 3).astype(int) - expected).max() <= 6


def test_colour_and_greyscale_are_converted(tmp_path: Path) -> None:
    write_image(tmp_path / "colour.png", np.full((4, 4, 3), [255, 0, 0], dtype=np.uint8))
    write_image(tmp_path / "grey.png", np.full((4, 4), 77, dtype=np.uint8))
    assert np.unique(decode(tmp_path / "colour.png", 4, 4, 1)).tolist() == [76]
    assert np.unique(decode(tmp_path / "grey.png", 4, 4, 3)).tolist() == [77]


def test_16_bit_greyscale_keeps_its_upper_8_bits(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8123, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.unique(decode(tmp_path / "deep.png", 4, 4, 1)).tolist() == [0x81]


def test_a_photograph_is_rotated_as_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255
    Image.fromarray(pixels).save(tmp_path / "side.jpg", exif=exif, quality=95)
    decoded = decode(tmp_path / "side.jpg", 32, 16, 3)
    assert decoded[:, :12].min() > 200
    assert decoded[:, 20:].max() < 50


FORMATS = {"png": "PNG", "webp": "WEBP", "bmp": "BMP", "tiff": "TIFF"}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("format_", FORMATS.values())
def test_a_sound_image_is_read_whatever_its_name(tmp_path: Path, format_: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(gradient(6, 9)).save(path, format=format_, **({"lossless": True} if format_ == "WEBP" else {}))
    assert np.array_equal(decode(path, 6, 9, 3), gradient(6, 9).transpose(2, 0, 1))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("size", [1 << 10, 3 << 20])
def test_a_png_with_much_text_is_read(tmp_path: Path, size: int, compressed: bool) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("settings", "x" * size, zip=compressed)
    text.add_itxt("notes", "y" * size, zip=compressed)
    Image.fromarray(gradient(6, 9)).save(tmp_path / "a.png", pnginfo=text)
    assert np.array_equal(decode(tmp_path / "a.png", 6, 9, 3), gradient(6, 9).transpose(2, 0, 1))


def exif(orientation: int, other: bytes) -> bytes:
    """Metadata with one more entry, of 12 bytes, before the orientation."""
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + other + entry + b"\0\0\0\0"


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "other",
    {
        "width is a float": struct.pack("<HHIf", 0x0100, 11, 1, 3.5),
        "width is text": struct.pack("<HHI4s", 0x0100, 2, 4, b"wide"),
        "width is negative": struct.pack("<HHIi", 0x0100, 9, 1, -5),
        "unknown type": struct.pack("<HHII", 0x0101, 99, 1, 7),
        "place outside of the file": struct.pack("<HHII", 0x010F, 2, 500, 60_000),
    }.values(),
)
def test_the_orientation_is_read_whatever_the_other_metadata_are(
    tmp_path: Path, orientation: int, other: bytes
) -> None:
    pixels = gradient(16, 32)
    Image.fromarray(pixels).save(tmp_path / "plain.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", quality=95, exif=exif(orientation, other))
    plain = np.asarray(Image.open(tmp_path / "plain.jpg"))
    upright = {
        1: plain, 2: plain[:, ::-1], 3: plain[::-1, ::-1], 4: plain[::-1], 5: plain.swapaxes(0, 1),
        6: np.rot90(plain, -1), 7: plain[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(plain),
    }[orientation]  # fmt: skip
    height, width = upright.shape[:2]
    decoded = decode(tmp_path / "turned.jpg", height, width, 3)
    assert np.array_equal(decoded, upright.transpose(2, 0, 1))


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DecodeError, match=r"a\.tiff: has floating-point pixels, whose range is unknown"):
        decode(tmp_path / "a.tiff", 4, 4, 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "1"])
def test_other_kinds_of_pixels_are_converted(tmp_path: Path, mode: str) -> None:
    Image.fromarray(np.full((4, 4, 3), 255, dtype=np.uint8)).convert(mode).save(tmp_path / "a.tiff")
    assert np.unique(decode(tmp_path / "a.tiff", 4, 4, 3)).tolist() == [255]


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "gif", "missing", "folder"])
def test_files_that_are_no_complete_images_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        buffer = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, format="GIF" if kind == "gif" else "JPEG")
        whole = buffer.getvalue()
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[: len(whole) // 2], "gif": whole}[kind])
    with pytest.raises(DecodeError) as caught:
        decode(path, 8, 8, 3)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "bomb.png", gradient(40, 40))
    monkeypatch.setattr("distrain.data.decode.LARGEST_PIXELS", 1000)
    with pytest.raises(DecodeError, match=r"bomb\.png: 40x40 are more than 1000 pixels"):
        decode(tmp_path / "bomb.png", 8, 8, 3)


def test_a_long_thin_image_is_decoded_without_a_large_intermediate(tmp_path: Path) -> None:
    write_image(tmp_path / "thin.png", np.full((1, 30_000, 3), 9, dtype=np.uint8))
    assert np.unique(decode(tmp_path / "thin.png", 64, 64, 3)).tolist() == [9]


def test_decoding_does_not_import_torch() -> None:
    script = "import sys, distrain.data.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
