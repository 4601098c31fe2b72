"""The images in a request's body: JSON with base64, a form with files, or one image as it is."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image, UnidentifiedImageError
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import File, parse_options_header

from distrain.data.decode import FORMATS, DecodeError, TooManyPixels, decode_bytes
from distrain.tools.serving.limits import Refused
from distrain.tools.serving.model import Pixels

#: Name of the list in JSON, and of the files in a form.
FIELD = "images"
JSON, FORM = "application/json", "multipart/form-data"
#: Finds the encoded images in a body.
Parser = Callable[[bytes], list[bytes]]
#: JSON values, or parts of a form, that a body may have besides the images.
_OTHER_PARTS = 1000
#: Before each value in JSON stands one of these, but for the first. Base64 has none of them.
_BEFORE_VALUES = b"[{,:"


def parser(content_type: str | None, most_images: int) -> Parser:
    """What finds the encoded images, at least one, in a body of this type.

    Args:
        content_type: What the request's header says.
        most_images: A body of many more parts is refused before it is parsed, since empty lists in JSON, say, take more
            than 20 times the memory of their text.

    Raises:
        Refused: No such bodies are read; also raised by the function that is returned.
    """
    kind, options = parse_options_header(content_type)
    name = kind.decode("latin-1").lower()
    most_parts = most_images + _OTHER_PARTS
    if name == JSON:
        return lambda body: _in_json(body, most_parts)
    if name == FORM:
        boundary = options.get(b"boundary")
        if not boundary:
            raise Refused(400, f"{FORM} needs a boundary", close=True)
        return lambda body: _in_form(body, boundary, most_parts)
    if name.startswith("image/"):
        return lambda body: [body]
    problem = f"the content type must be {JSON}, {FORM} or image/…, not {name[:100] or 'absent'}"
    raise Refused(415, problem, close=True)


def _check_parts(count: int, most: int) -> None:
    if count > most:
        raise Refused(413, f"the body has more than {most} parts; one for each image is enough")


def _in_json(body: bytes, most_parts: int) -> list[bytes]:
    _check_parts(sum(map(body.count, _BEFORE_VALUES)), most_parts)
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON ({error})") from error
    texts = content.get(FIELD) if isinstance(content, dict) else None
    if not isinstance(texts, list) or not texts:
        raise Refused(422, f'the JSON must be {{"{FIELD}": [BASE64, …]}}, with at least one image')
    return [_from_base64(place, text) for place, text in enumerate(texts)]


def _from_base64(place: int, text: object) -> bytes:
    if not isinstance(text, str):
        raise Refused(422, f"{FIELD}[{place}] is no text; an image is given in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(422, f"{FIELD}[{place}] is not base64 ({error})") from error


def _in_form(body: bytes, boundary: bytes, most_parts: int) -> list[bytes]:
    _check_parts(body.count(b"--" + boundary), most_parts)
    found: list[bytes] = []

    def keep(file: File) -> None:
        if file.field_name == FIELD.encode():
            file.file_object.seek(0)
            found.append(file.file_object.read())

    # Everything is in memory already, and nothing goes to the disk.
    memory = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    try:
        parser = FormParser(FORM, lambda field: None, keep, boundary=boundary, config=memory)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Refused(400, f"the form can't be read ({error})") from error
    if not found:
        raise Refused(422, f"the form has no file named {FIELD}")
    return found


def decoded(encoded: list[bytes], shape: tuple[int, int, int], most_pixels: int) -> Iterator[Pixels]:
    """Decodes images, one after the other, as those of an image folder are decoded for an evaluation.

    Args:
        encoded: The images.
        shape: Channels, height and width of the result.
        most_pixels: Larger images are refused before they are decoded.

    Raises:
        Refused: One can't be decoded, or has too many pixels.
    """
    channels, height, width = shape
    for place, data in enumerate(encoded):
        try:
            yield decode_bytes(data, f"{FIELD}[{place}]", height, width, channels, most_pixels)
        except DecodeError as error:
            if isinstance(error.__cause__, UnidentifiedImageError):
                raise Refused(422, f"image {place} is neither {' nor '.join(FORMATS)}") from error
            large = isinstance(error.__cause__, TooManyPixels | Image.DecompressionBombError)
            raise Refused(413 if large else 422, f"image {place} can't be decoded: {error.reason}") from error
