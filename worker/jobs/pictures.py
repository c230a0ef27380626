"""Images as PNG files, alone and in sheets. The same pixels and recipe give the same bytes. Knows no torch."""

import io
import json
from collections.abc import Mapping
from math import ceil, sqrt
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shared.errors import DatasetInvalid

RECIPE: Final = "noisemill"
"""PNG text chunk that holds the recipe as JSON."""
GAP: Final = 2
"""Pixels between the images of a sheet."""
SMALLEST_TILE: Final = 56
"""Images of a sheet are enlarged by a whole factor to at least this many pixels."""

Pixels = NDArray[np.uint8]


def encode_png(image_CHW: Pixels, recipe: Mapping[str, Any] | None = None) -> bytes:
    """A PNG of one or three channels, with ``recipe`` inside; no time stamp, so equal inputs give equal bytes."""
    channels = image_CHW.shape[0]
    if channels not in (1, 3):
        raise ValueError(f"a PNG has 1 or 3 channels, not {channels}")
    pixels = image_CHW[0] if channels == 1 else image_CHW.transpose(1, 2, 0)
    text = PngInfo()
    if recipe is not None:
        text.add_itxt(RECIPE, json.dumps(recipe, sort_keys=True))
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=6, pnginfo=text)
    return file.getvalue()


def decode_png(path: Path) -> Pixels:
    """The pixels ``(C, H, W)`` of a PNG of ours, of one channel if it is grey and else of three.

    Raises:
        DatasetInvalid: it is damaged, or something else.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DatasetInvalid(f"a picture cannot be read: {error}") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def fitted(image_CHW: Pixels, shape: tuple[int, ...]) -> Pixels:
    """The image as one of ``shape``, to be seen beside others: enlarged by a whole factor, grey as three channels."""
    channels, height, _ = shape
    factor = height // image_CHW.shape[1]
    large_CHW = image_CHW.repeat(factor, axis=1).repeat(factor, axis=2)
    return np.broadcast_to(large_CHW, (channels, *large_CHW.shape[1:])) if large_CHW.shape[0] == 1 else large_CHW


def sheet(images_BCHW: Pixels, *, columns: int | None = None) -> Pixels:
    """The images in rows, left to right, as one ``(C, H, W)`` image; nearly square unless ``columns`` is given."""
    num_images, channels, height, width = images_BCHW.shape
    columns = columns or ceil(sqrt(num_images))
    rows = ceil(num_images / columns)
    factor = max(1, ceil(SMALLEST_TILE / max(height, width)))
    large_BCHW = images_BCHW.repeat(factor, axis=2).repeat(factor, axis=3)
    height, width = height * factor, width * factor
    canvas = np.full((channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP), 32, np.uint8)
    for place, image_CHW in enumerate(large_BCHW):
        row, column = divmod(place, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        canvas[:, top : top + height, left : left + width] = image_CHW
    return canvas
