"""Decoding one image file, and a worker process that decodes many.

A worker is ``python -m distrain.data.decode JOB INDEX COUNT``. It imports neither torch nor the program that started
it, and nothing is pickled: the job is JSON, the pixels go straight into a file, the answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

#: The only decoders that are ever used, whatever a file claims to be.
FORMATS = ("JPEG", "PNG")
#: File names that are taken for images.
SUFFIXES = (".jpg", ".jpeg", ".png")
#: An image that claims more is refused before it is decoded; Pillow's own limit, 256 MiB of colours.
LARGEST_PIXELS = (1 << 28) // 3
#: No file whose pixels are allowed needs more, whatever else it carries.
LARGEST_FILE = 1 << 30
#: Images a worker decodes between two reports.
CHUNK = 64
_REASON_LENGTH = 300


class DecodeError(ValueError):
    """A file that can't be decoded; the message names it and says why, in one line."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.reason = " ".join(reason.split())[:_REASON_LENGTH]
        super().__init__(f"{os.fspath(path)}: {self.reason}")


def decode(path: str | os.PathLike[str], height: int, width: int, channels: int) -> npt.NDArray[np.uint8]:
    """Decodes a JPEG or PNG file and brings it to a size.

    The image is turned upright (EXIF), its shorter side scaled to the target, and the middle cut out; an image that has
    the size already is not touched. Transparency is dropped; 16-bit grey keeps its upper 8 bits.

    Args:
        path: The file.
        height: Rows of the result.
        width: Columns of the result.
        channels: 3 for RGB, 1 for grey.

    Returns:
        uint8 [channels, height, width].

    Raises:
        DecodeError: Not a JPEG or PNG file, truncated, broken, not readable, of more than ``LARGEST_PIXELS`` pixels or
            ``LARGEST_FILE`` bytes.
    """
    try:
        if Path(path).stat().st_size > LARGEST_FILE:
            raise ValueError(f"has more than {LARGEST_FILE} bytes")
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > LARGEST_PIXELS:
                raise ValueError(f"{opened.width}x{opened.height} are more than {LARGEST_PIXELS} pixels")
            # A JPEG far larger than needed is decoded at a fraction of its size, still twice what is needed.
            opened.draft("RGB" if channels == 3 else "L", (2 * max(height, width),) * 2)
            image = _fitted(_flat(ImageOps.exif_transpose(opened), channels), height, width)
    except Exception as error:  # broken files make Pillow raise nearly anything, SyntaxError and struct.error included
        raise DecodeError(path, str(error) or type(error).__name__) from error
    pixels = np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _flat(image: Image.Image, channels: int) -> Image.Image:
    """The image in RGB or grey."""
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit values at 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB" if channels == 3 else "L")


def _fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    # Scaling and cutting in one step, so that a long thin image is never made large first.
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def work(job: dict[str, Any], index: int, count: int) -> None:
    """Decodes every ``count``-th chunk of a job's files and reports each chunk, and each broken file, on stdout.

    Args:
        job: ``root``, ``files`` (paths below it), ``height``, ``width``, ``channels``; ``images`` and ``moments``, the
            files to write, in which each image has its own place.
        index: This worker.
        count: Workers.
    """
    root, files = job["root"], job["files"]
    height, width, channels = job["height"], job["width"], job["channels"]
    size = channels * height * width
    with (
        Path(job["images"]).open("r+b", buffering=0) as images,
        Path(job["moments"]).open("r+b", buffering=0) as moments,
    ):
        for start in range(index * CHUNK, len(files), count * CHUNK):
            stop = min(start + CHUNK, len(files))
            pixels = np.zeros((stop - start, channels, height, width), dtype=np.uint8)
            for row in range(start, stop):
                try:
                    pixels[row - start] = decode(Path(root, files[row]), height, width, channels)
                except DecodeError as error:
                    _report({"broken": row, "reason": error.reason})
            flat = pixels.reshape(stop - start, channels, -1).astype(np.int64)
            sums = np.stack((flat.sum(2), (flat * flat).sum(2)), axis=2)
            _write(images, pixels.tobytes(), start * size)
            _write(moments, sums.tobytes(), start * channels * 16)
            _report({"done": stop - start})


def _write(file: Any, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written


def _report(message: dict[str, Any]) -> None:
    # One write of less than PIPE_BUF bytes, so that the workers can share a pipe.
    os.write(sys.stdout.fileno(), (json.dumps(message) + "\n").encode())


def main(arguments: list[str]) -> int:
    """Runs one worker; see the module."""
    path, index, count = arguments
    warnings.simplefilter("ignore")  # Pillow's, about files that it reads all the same
    try:
        work(json.loads(Path(path).read_text()), int(index), int(count))
    except BrokenPipeError:
        return 1  # the builder has gone
    except OSError as error:
        _report({"failed": str(error)[:_REASON_LENGTH]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
