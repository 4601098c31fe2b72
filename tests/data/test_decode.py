"""Images are decoded, resized and cropped as documented, and files that are not whole images are refused."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from distrain.data.decode import DecodeError, decode, decode_mask
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
    # 99 / 74 * 74 is more than 99 in floating-point numbers.
    write_image(tmp_path / "odd.png", pixels.repeat(5, axis=0)[:99].repeat(3, axis=1)[:, :166])
    assert decode(tmp_path / "odd.png", 74, 74, 3).shape == (3, 74, 74)
    write_image(tmp_path / "turned.png", pixels.repeat(5, axis=0)[:99].repeat(3, axis=1)[:, :166].transpose(1, 0, 2))
    assert decode(tmp_path / "turned.png", 74, 74, 3).shape == (3, 74, 74)


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


def test_a_mask_and_its_image_may_have_much_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pillow's own limits, which decoding another image before would have raised.
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 20)
    text = PngImagePlugin.PngInfo()
    text.add_text("settings", "x" * (3 << 20), zip=True)
    classes = gradient(6, 9)[..., 0]
    for name, pixels in (("image.png", gradient(6, 9)), ("mask.png", classes)):
        Image.fromarray(pixels).save(tmp_path / name, pnginfo=text)
    assert np.array_equal(decode_mask(tmp_path / "mask.png", tmp_path / "image.png", 6, 9)[0], classes)


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


#: Two pixels of each kind, and what they are in RGB and in greyscale.
RED, GREY, WHITE, BLACK = (255, 0, 0), (119, 119, 119), (255, 255, 255), (0, 0, 0)
U16 = np.array([[0x8123, 0xFFFF]], dtype=np.uint16)


def encoded(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_, **options)
    return buffer.getvalue()


def pixels(mode: str, *values: Any) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def palette(*indices: int) -> Image.Image:
    image = pixels("P", *indices)
    image.putpalette([*RED, *GREY])
    return image


def white_is_zero(image: Image.Image) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    return encoded(image, "TIFF", tiffinfo=tags)


def tiff_of_bits(bits: int, sample_format: int, data: bytes, width: int = 2) -> bytes:
    """A TIFF with one row of greyscale pixels in a form that Pillow can't write."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (339, sample_format)])
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    return head + struct.pack("<H", len(tags) + 1) + entries + bytes(4)


def ycck_jpeg() -> bytes:
    """As Adobe writes it: all four planes inverted, and the first three as YCbCr."""
    planes = [Image.new("L", (16, 16), value) for value in (*(255 - 128, 255 - 128, 255 - 128), 255 - 255)]
    content = encoded(Image.merge("CMYK", planes), "JPEG", quality=100)
    place = content.index(b"Adobe") + 11
    return content[:place] + b"\2" + content[place + 1 :]


KINDS: dict[str, tuple[bytes, list[tuple[int, ...]], list[int]]] = {
    "1 bit": (encoded(pixels("1", 0, 255), "PNG"), [BLACK, WHITE], [0, 255]),
    "1 bit, 0 is white": (white_is_zero(pixels("1", 0, 255)), [BLACK, WHITE], [0, 255]),
    "grey": (encoded(pixels("L", 119, 255), "PNG"), [GREY, WHITE], [119, 255]),
    "grey, 0 is white": (white_is_zero(pixels("L", 119, 255)), [GREY, WHITE], [119, 255]),
    "grey with a transparent value": (encoded(pixels("L", 119, 9), "PNG", transparency=9), [GREY, WHITE], [119, 255]),
    "LA": (encoded(pixels("LA", (119, 255), (0, 0)), "PNG"), [GREY, WHITE], [119, 255]),
    "LA as TIFF": (encoded(pixels("LA", (119, 255), (0, 0)), "TIFF"), [GREY, WHITE], [119, 255]),
    "16 bits": (encoded(Image.fromarray(U16), "PNG"), [(0x81,) * 3, WHITE], [0x81, 255]),
    "16 bits as TIFF": (encoded(Image.fromarray(U16), "TIFF"), [(0x81,) * 3, WHITE], [0x81, 255]),
    "16 bits, compressed": (encoded(Image.fromarray(U16), "TIFF", compression="tiff_lzw"), [(0x81,) * 3, WHITE], []),
    "16 bits, big-endian": (
        encoded(Image.frombytes("I;16B", (2, 1), U16.astype(">u2").tobytes()), "TIFF"), [(0x81,) * 3, WHITE], []
    ),
    "16 bits, 0 is white": (white_is_zero(Image.fromarray(U16)), [(0x7E,) * 3, BLACK], [0x7E, 0]),
    "16 bits with a transparent value": (
        encoded(Image.fromarray(U16), "PNG", transparency=0x8123), [WHITE, WHITE], [255, 255]
    ),
    "12 bits": (tiff_of_bits(12, 1, bytes([0x81, 0x2F, 0xFF])), [(0x81,) * 3, WHITE], [0x81, 255]),
    "32 bits": (tiff_of_bits(32, 1, struct.pack("<II", 0x8123, 0xFFFF)), [(0x81,) * 3, WHITE], [0x81, 255]),
    "palette": (encoded(palette(0, 1), "PNG"), [RED, GREY], [76, 119]),
    "palette with a transparent colour": (encoded(palette(0, 1), "PNG", transparency=0), [WHITE, GREY], [255, 119]),
    "palette with alpha": (encoded(palette(0, 1), "PNG", transparency=b"\0\xff"), [WHITE, GREY], [255, 119]),
    "RGB": (encoded(pixels("RGB", RED, GREY), "PNG"), [RED, GREY], [76, 119]),
    "RGB with a transparent colour": (
        encoded(pixels("RGB", RED, BLACK), "PNG", transparency=BLACK), [RED, WHITE], [76, 255]
    ),
    "RGBA": (encoded(pixels("RGBA", (*RED, 255), (9, 8, 7, 0)), "PNG"), [RED, WHITE], [76, 255]),
    "RGBA, half transparent": (
        encoded(pixels("RGBA", (0, 0, 0, 128), (*RED, 128)), "PNG"), [(127,) * 3, (255, 127, 127)], [127, 165]
    ),
    "RGBA as TIFF": (encoded(pixels("RGBA", (*RED, 255), (9, 8, 7, 0)), "TIFF"), [RED, WHITE], [76, 255]),
    "RGBA as WebP": (
        encoded(pixels("RGBA", (*RED, 255), (9, 8, 7, 0)), "WEBP", lossless=True, exact=True), [RED, WHITE], [76, 255]
    ),
    "CMYK as TIFF": (encoded(pixels("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), "TIFF"), [RED, WHITE], [76, 255]),
    "CMYK JPEG": (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100), [RED], [76]),
    "YCCK JPEG": (ycck_jpeg(), [(128,) * 3], [128]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixels_becomes_rgb_and_greyscale(tmp_path: Path, kind: str) -> None:
    content, rgb, grey = KINDS[kind]
    path = tmp_path / "a.image"
    path.write_bytes(content)
    height, width = (16, 16) if "JPEG" in kind else (1, 2)
    error = 1 if "JPEG" in kind else 0
    decoded = decode(path, height, width, 3).astype(int)[:, 0, : len(rgb)].T
    assert np.abs(decoded - rgb).max() <= error
    if grey:
        assert np.abs(decode(path, height, width, 1).astype(int)[0, 0, : len(grey)] - grey).max() <= error


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(Image.fromarray(np.ones((1, 2), dtype=np.float32)), "TIFF"), "has floating-point pixels, whose range"),
        (tiff_of_bits(32, 1, struct.pack("<II", 9, 70_000)), "has pixels from 9 to 70000; greyscale may have values"),
        (tiff_of_bits(16, 2, struct.pack("<hh", -1024, 3071)), "has pixels from -1024 to 3071; greyscale may have"),
    ],
)
def test_pixels_that_8_bits_cant_hold_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.tiff").write_bytes(content)
    with pytest.raises(DecodeError, match=rf"a\.tiff: {re.escape(reason)}"):
        decode(tmp_path / "a.tiff", 1, 2, 3)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_format_is_turned_once_as_exif_says(tmp_path: Path, format_: str) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    halves = np.zeros((16, 32, 3), dtype=np.uint8)
    halves[:, :16] = 255
    Image.fromarray(halves).save(tmp_path / "a", format=format_, exif=turned)
    decoded = decode(tmp_path / "a", 32, 16, 3)
    assert decoded[:, :12].min() > 200
    assert decoded[:, 20:].max() < 50


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
