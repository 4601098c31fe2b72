"""Decodes image files, one at a time or in worker processes.

A worker is started as ``python -m distrain.data.decode JOB INDEX COUNT``. It imports neither torch nor the program that
started it, and nothing is pickled: the job is a JSON file, pixels are written directly to a file, and messages to the
parent process are lines of JSON on stdout.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin, TiffImagePlugin

from distrain.data.byte_ranges import ByteRanges, end_to_end

#: The only decoders that are used, whatever format a file claims to have by its name.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
#: File name extensions of images.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
#: Larger images are refused before they are decoded. This is Pillow's own limit: 256 MiB of RGB values.
LARGEST_PIXELS = (1 << 28) // 3
#: Larger files are refused, in bytes; no image of an allowed size needs more.
LARGEST_FILE = 1 << 30
#: Number of images that a worker decodes between two progress messages.
CHUNK = 64
#: Limit for the text in a PNG file, in bytes, which is read with the pixels and not used. Pillow's own limit of 1 MiB
#: refuses sound images that carry the settings of a program.
_LARGEST_TEXT = 1 << 24
#: EXIF tag of an image's orientation, and how an image with each value is turned upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: TIFF tags: bits of each sample, and what the value 0 means.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0
#: Longer reasons for a failure are cut off.
_REASON_LENGTH = 300


class DecodeError(ValueError):
    """A file can't be decoded.

    Args:
        path: The file.
        reason: Why it can't be decoded.

    Attributes:
        reason: The reason as one line of limited length.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.reason = " ".join(reason.split())[:_REASON_LENGTH]
        super().__init__(f"{os.fspath(path)}: {self.reason}")


class TooManyPixels(ValueError):
    """An image has more pixels than are decoded."""


def decode(path: str | os.PathLike[str], height: int, width: int, channels: int) -> npt.NDArray[np.uint8]:
    """Decodes an image file of one of :data:`FORMATS`, and resizes and crops the image.

    The image (the first one of an animation) is rotated as its EXIF orientation says, scaled until it just covers the
    target size, and centre-cropped; an image that already has the target size is unchanged.

    Every kind of pixels becomes RGB or greyscale of 8 bits:

    * 1 bit: black and white. A palette: its colours. CMYK (in a JPEG as Adobe stores it, inverted), YCCK, YCbCr: RGB.
    * Greyscale of more bits keeps the upper 8: it is scaled, so that white stays white, as the 16 bits of a coloured
      PNG are. A TIFF whose 0 is white is inverted. Values that don't fit 16 bits are refused.
    * Transparent pixels show white, as on a page: what is stored below them is arbitrary and often black, and then dark
      drawings would vanish. (Pillow, torchvision and OpenCV show what is stored below.)
    * Floating point is refused, since no file says which value is white.

    RGB becomes greyscale by the weights of ITU-R 601. Colour profiles and gamma are not applied.

    Args:
        path: The file.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        channels: 3 for RGB, 1 for greyscale.

    Returns:
        uint8 [channels, height, width].

    Raises:
        DecodeError: Not a file of these formats, truncated, corrupt, not readable, of pixels that 8 bits can't hold,
            more than ``LARGEST_PIXELS`` pixels, or more than ``LARGEST_FILE`` bytes.
    """
    try:
        _check_bytes(Path(path).stat().st_size)
        return _decode(path, height, width, channels)
    except Exception as error:  # corrupt files make Pillow raise almost anything, even SyntaxError and struct.error
        raise DecodeError(path, str(error) or type(error).__name__) from error


def read_piece(pieces: ByteRanges, index: int) -> bytes:
    """Reads an encoded image that is a piece of another file.

    Raises:
        DecodeError: It can't be read, or has more than ``LARGEST_FILE`` bytes.
    """
    try:
        _check_bytes(pieces.size[index])
        return pieces.read(index)
    except (OSError, ValueError) as error:
        raise DecodeError(place(pieces, index), str(error)) from error


def place(pieces: ByteRanges, index: int) -> str:
    """What to call a piece in an error: its file and where it begins there."""
    return f"{pieces.paths[pieces.file[index]]}, image at byte {pieces.start[index]}"


def decode_bytes(
    data: bytes, name: str, height: int, width: int, channels: int, most_pixels: int | None = None
) -> npt.NDArray[np.uint8]:
    """As :func:`decode`, for the content of a file.

    Args:
        data: The content.
        name: What to call it in an error.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        channels: 3 for RGB, 1 for greyscale.
        most_pixels: Images of more pixels are refused; ``None``: those of more than ``LARGEST_PIXELS``.

    Raises:
        DecodeError: As for :func:`decode`; caused by :class:`TooManyPixels` if that is why.
    """
    try:
        return _decode(io.BytesIO(data), height, width, channels, most_pixels)
    except Exception as error:  # as above
        raise DecodeError(name, str(error) or type(error).__name__) from error


def _check_bytes(size: int) -> None:
    if size > LARGEST_FILE:
        raise ValueError(f"has more than {LARGEST_FILE} bytes")


def _open(source: str | os.PathLike[str] | IO[bytes], most_pixels: int | None = None) -> Image.Image:
    """Opens an image, and decodes nothing yet.

    Raises:
        TooManyPixels: It has more pixels than may be.
    """
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _LARGEST_TEXT
    opened = Image.open(source, formats=FORMATS)
    most_pixels = LARGEST_PIXELS if most_pixels is None else most_pixels
    if opened.width * opened.height > most_pixels:
        opened.close()
        raise TooManyPixels(f"{opened.width}x{opened.height} are more than {most_pixels} pixels")
    return opened


def _decode(
    source: str | os.PathLike[str] | IO[bytes],
    height: int,
    width: int,
    channels: int,
    most_pixels: int | None = None,
) -> npt.NDArray[np.uint8]:
    with _open(source, most_pixels) as opened:
        # Decodes a much larger JPEG at a reduced size, which is at least twice the target size. This is faster.
        opened.draft("RGB" if channels == 3 else "L", (2 * max(height, width),) * 2)
        opened.load()
        image = _on_white(_to_8_bits(opened)).convert("RGB" if channels == 3 else "L")
        image = _resize_and_crop(_upright(image, opened), height, width)
    pixels = np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode_mask(
    path: str | os.PathLike[str], of: str | os.PathLike[str], height: int, width: int
) -> npt.NDArray[np.uint8]:
    """Decodes a mask, whose pixels are class numbers, and resizes and crops it as :func:`decode` does the image.

    Of an image with a palette, the numbers of the colours are the classes. The nearest pixel is taken, since a mean of
    class numbers means nothing.

    Args:
        path: The file.
        of: The file of the image that it is a mask of, which must have the same size.
        height: Height of the result in pixels.
        width: Width of the result in pixels.

    Returns:
        uint8 [1, height, width].

    Raises:
        DecodeError: As for :func:`decode`; or the file is a JPEG, coloured, of another size, or has values above 255.
    """
    try:
        _check_bytes(Path(path).stat().st_size)
        with _open(path) as opened, _open(of) as image:
            if opened.format in ("JPEG", "MPO"):
                raise ValueError("is a JPEG, whose pixels are not exactly those that were saved; masks are PNG files")
            # Looked at before loading, since Pillow turns a TIFF then.
            sizes = [_upright_size(file) for file in (opened, image)]
            opened.load()
            mask = _upright(Image.fromarray(_class_numbers(opened)), opened)
            if sizes[0] != sizes[1]:
                mask_size, image_size = ("x".join(map(str, size)) for size in sizes)
                raise ValueError(f"is {mask_size} pixels, and its image {os.fspath(of)} is {image_size}")
            mask = _resize_and_crop(mask, height, width, Image.Resampling.NEAREST)
    except Exception as error:  # as for images
        raise DecodeError(path, str(error) or type(error).__name__) from error
    return np.asarray(mask, dtype=np.uint8)[None]


def _class_numbers(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels of a mask as numbers [height, width]."""
    values = np.asarray(image)
    if values.ndim == 3:
        # Some programs save grey as three equal colours, with an opaque fourth channel.
        colours = values[..., : len(image.getbands()) - (image.mode in ("LA", "PA", "RGBA"))]
        if (colours != colours[..., :1]).any():
            raise ValueError(f"is coloured ({image.mode}); the pixels of a mask are class numbers: grey, or a palette")
        values = colours[..., 0]
    if image.mode == "F" or values.min() < 0 or values.max() > 255:
        raise ValueError(f"has pixels from {values.min()} to {values.max()}; class numbers are whole, 0 to 255")
    return values.astype(np.uint8)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after turning an image as its EXIF orientation says."""
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    turned = not is_tiff and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales greyscale of more than 8 bits to 8 bits; other images stay as they are.

    Raises:
        ValueError: The pixels are floating point, or don't fit 16 bits.
    """
    if image.mode == "F":
        raise ValueError("has floating-point pixels, whose range is unknown; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    # Pillow's own conversion clips at 255, and knows neither 12 bits nor a white 0 here.
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = min(16, tags.get(_BITS_PER_SAMPLE, (16,))[0])
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"has pixels from {low} to {high}; greyscale may have values from 0 to {(1 << bits) - 1}")
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    """Lays an image with transparent pixels over white."""
    if not image.has_transparency_data:
        return image
    opaque = Image.new("RGB", image.size, "white")
    image = image.convert("RGBA")
    opaque.paste(image, mask=image)
    return opaque


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Turns an image as the EXIF orientation of the opened file says; other metadata are ignored, sound or not."""
    try:
        # A TIFF has none left: Pillow has turned it already.
        orientation = opened.getexif().get(_ORIENTATION)
    except Exception:  # broken metadata makes Pillow raise almost anything, and the pixels are sound without it
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _resize_and_crop(
    image: Image.Image, height: int, width: int, resampling: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    if image.size == (width, height):
        return image
    # Scales and crops in one step; scaling first would make a large intermediate image of a long, thin one.
    scale = min(image.width / width, image.height / height)
    # Rounding must not lead out of the image: 99 / 74 * 74 is more than 99.
    shown_width, shown_height = min(scale * width, image.width), min(scale * height, image.height)
    left, top = (image.width - shown_width) / 2, (image.height - shown_height) / 2
    box = (left, top, min(left + shown_width, image.width), min(top + shown_height, image.height))
    return image.resize((width, height), resampling, box=box)


def decode_chunks(job: dict[str, Any], index: int, count: int) -> None:
    """Decodes every ``count``-th chunk of a job's images, and reports each chunk and each broken image on stdout.

    Args:
        job: ``root``; ``files``, paths relative to it; ``masks_of``, paths of the images that the files are masks of,
            or ``null`` if they are images; ``pieces``, lists of the files' indices, starts and sizes in
            bytes (see :class:`ByteRanges`), or ``null`` if each file is an image; ``height``, ``width`` and
            ``channels``; ``moments``, ``images`` and ``encoded``, paths of the output files, which must have their
            final size already; the last two may be ``null``, and a copy of the encoded images needs ``pieces``.
        index: Index of this worker, counted from 0.
        count: Number of workers.
    """
    root, files, masks_of = job["root"], job["files"], job["masks_of"]
    height, width, channels = job["height"], job["width"], job["channels"]
    size = channels * height * width
    pieces = None if job["pieces"] is None else ByteRanges([Path(root, file) for file in files], *job["pieces"])
    count_of_images = len(files) if pieces is None else len(pieces)
    copies = None if pieces is None else end_to_end(Path(), pieces.size)
    with contextlib.ExitStack() as stack:
        images, encoded, moments = (
            None if job[name] is None else stack.enter_context(Path(job[name]).open("r+b", buffering=0))
            for name in ("images", "encoded", "moments")
        )
        for start in range(index * CHUNK, count_of_images, count * CHUNK):
            stop = min(start + CHUNK, count_of_images)
            pixels = np.zeros((stop - start, channels, height, width), dtype=np.uint8)
            for row in range(start, stop):
                try:
                    if masks_of is not None:
                        image = Path(root, masks_of[row])
                        pixels[row - start] = decode_mask(Path(root, files[row]), image, height, width)
                        continue
                    if pieces is None:
                        pixels[row - start] = decode(Path(root, files[row]), height, width, channels)
                        continue
                    data = read_piece(pieces, row)
                    pixels[row - start] = decode_bytes(data, place(pieces, row), height, width, channels)
                    if encoded is not None and copies is not None:
                        _write(encoded, data, int(copies.start[row]))
                except DecodeError as error:
                    _report({"broken": row, "reason": error.reason})
            if images is not None:
                _write(images, pixels.tobytes(), start * size)
            flat = pixels.reshape(stop - start, channels, -1).astype(np.int64)
            sums = np.stack((flat.sum(2), (flat * flat).sum(2)), axis=2)
            _write(moments, sums.tobytes(), start * channels * 16)
            _report({"done": stop - start})


def _write(file: Any, data: bytes, offset: int) -> None:
    file.seek(offset)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _report(message: dict[str, Any]) -> None:
    # One write of less than PIPE_BUF bytes is atomic, so that all workers can share a pipe.
    os.write(sys.stdout.fileno(), (json.dumps(message) + "\n").encode())


def main(arguments: list[str]) -> int:
    """Runs one worker; see the module's docstring.

    Args:
        arguments: Path of the job file, the worker's index, number of workers.

    Returns:
        The exit code.
    """
    path, index, count = arguments
    warnings.simplefilter("ignore")  # Pillow warns about files that it can read nevertheless
    try:
        decode_chunks(json.loads(Path(path).read_text()), int(index), int(count))
    except BrokenPipeError:
        return 1  # the parent process has ended
    except OSError as error:
        _report({"failed": str(error)[:_REASON_LENGTH]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
