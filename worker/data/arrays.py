"""Images in an ``.npz``: an array of them, and perhaps their labels.

Images are the array named ``images``, ``x`` or ``arr_0``; labels the one named ``labels``, ``y`` or ``arr_1``.
Shapes are (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3. Values are uint8, or floats from 0 to 1,
which become ``round(255 x)``. Any other type or range is refused, never guessed at. Arrays are mapped from a
scratch file after their header was checked against the bytes that are there; nothing is unpickled.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.errors import DatasetInvalid
from worker.data.archive import read_members
from worker.data.decoder import fit
from worker.data.images import Shape, check_shape
from worker.data.members import Limits
from worker.data.progress import Progress
from worker.data.spool import Entry, Spool
from worker.data.writing import Annotations, Canonical, ImageWriter

IMAGE_KEYS: Final = ("images", "x", "arr_0")
LABEL_KEYS: Final = ("labels", "y", "arr_1")
LIMITS: Final = Limits(members=64, member_bytes=16 << 30, total_bytes=32 << 30, ratio=1100)
"""A blank image in an array compresses as well as deflate can, 1032 times; the size limits remain."""
CHUNK_BYTES: Final = 8 << 20
CHANNELS: Final = (1, 3)

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How to see an array as (N, C, H, W)."""

    axes: tuple[int, int, int] | None
    """Order in which the axes of one image become C, H, W; None for grey images without a channel axis."""
    shape: Shape


def is_npz(names: list[str]) -> bool:
    """Whether a zip with these members is an ``.npz``."""
    return bool(names) and all(name.endswith(".npy") and "/" not in name for name in names)


def convert_npz(path: Path, spool: Spool, folder: Path, *, resolution: int | None, progress: Progress) -> Canonical:
    """Write the images of an ``.npz`` as a canonical dataset.

    Raises:
        DatasetInvalid: an array is missing, or is not what it must be; the message names it.
    """
    progress.phase("reading", 300)
    entries, found = _spool_arrays(path, spool)
    image_key = _first(IMAGE_KEYS, entries)
    if image_key is None:
        raise DatasetInvalid(f"the .npz has no array named {', '.join(IMAGE_KEYS)}; found: {', '.join(found)}")
    images = _mapped(spool, entries[image_key], image_key)
    label_key = _first(LABEL_KEYS, entries)
    labels = None if label_key is None else _mapped(spool, entries[label_key], label_key)
    annotations = Annotations(labels=None if labels is None else _label_names(labels, str(label_key), len(images)))
    layout = _layout(images, image_key)
    shape = layout.shape if resolution is None else (layout.shape[0], resolution, resolution)
    check_shape(len(images), shape)
    progress.phase("converting", 900)
    with ImageWriter(folder, shape) as writer:
        for image in _chunked(images, image_key, progress):
            writer.add(_shaped(image, layout, shape))
        return writer.finish(annotations, {})


def _chunked(images: Array, key: str, progress: Progress) -> Iterator[NDArray[np.uint8]]:
    """Convert and yield the images without holding all of them in memory."""
    per_chunk = max(1, CHUNK_BYTES // max(1, math.prod(images.shape[1:])))
    for start in range(0, len(images), per_chunk):
        yield from _as_uint8(images[start : start + per_chunk], key, start)
        progress.report(min(start + per_chunk, len(images)), len(images))


def _spool_arrays(path: Path, spool: Spool) -> tuple[Mapping[str, Entry], list[str]]:
    entries: dict[str, Entry] = {}
    found: list[str] = []
    for member in read_members(path, LIMITS):
        key = member.name.removesuffix(".npy")
        found.append(key[:40])
        if key in IMAGE_KEYS or key in LABEL_KEYS:
            entries[key] = spool.add(member.name, member.chunks())
    return entries, found


def _mapped(spool: Spool, entry: Entry, key: str) -> Array:
    """Map an array after checking that its header tells the truth about its size."""
    with spool.path.open("rb") as file:
        file.seek(entry.offset)
        shape, is_fortran, dtype = _header(file, key)
        data_offset = file.tell()
    if dtype.kind not in "uif" or dtype.shape:
        raise DatasetInvalid(f"array {key}: {_short(dtype)} values are not allowed; use uint8 or float32")
    if not shape or any(length <= 0 for length in shape):
        raise DatasetInvalid(f"array {key}: the shape {_short(shape)} holds nothing")
    declared, held = math.prod(shape) * dtype.itemsize, entry.offset + entry.size - data_offset
    if declared != held:
        raise DatasetInvalid(f"array {key}: the header declares {_short(declared)} bytes and {held} are there")
    order = "F" if is_fortran else "C"
    return np.memmap(spool.path, dtype=dtype, mode="r", offset=data_offset, shape=shape, order=order)


def _header(file: Any, key: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        return readers[version](file)
    except Exception as error:  # numpy's parser lets through whatever Python's tokenizer raises on such a header
        raise DatasetInvalid(f"array {key}: not a readable .npy header ({_short(error)})") from error


def _layout(images: Array, key: str) -> _Layout:
    shape = images.shape
    if len(shape) == 3:
        return _Layout(axes=None, shape=(1, shape[1], shape[2]))
    is_first, is_last = (len(shape) == 4 and shape[axis] in CHANNELS for axis in (1, 3))
    if is_first == is_last:
        problem = "could be channels first or last" if is_first else "is not (N, H, W), (N, H, W, C) or (N, C, H, W)"
        raise DatasetInvalid(f"array {key}: the shape {_short(shape)} {problem}, where C is 1 or 3")
    if is_first:
        return _Layout(axes=(0, 1, 2), shape=(shape[1], shape[2], shape[3]))
    return _Layout(axes=(2, 0, 1), shape=(shape[3], shape[1], shape[2]))


def _as_uint8(chunk: Array, key: str, start: int) -> NDArray[np.uint8]:
    if chunk.dtype == np.uint8:
        return chunk
    if chunk.dtype.kind != "f":
        raise DatasetInvalid(f"array {key}: {chunk.dtype} values are not allowed; use uint8, or floats from 0 to 1")
    values = np.asarray(chunk, dtype=np.float64)
    # Not a number compares false with everything.
    is_good = ((values >= 0) & (values <= 1)).reshape(len(values), -1)
    if not is_good.all():
        index = int(np.argmin(is_good.all(axis=1)))
        value = values[index].reshape(-1)[int(np.argmin(is_good[index]))]
        raise DatasetInvalid(f"array {key}: image {start + index} has the value {value}; floats must be from 0 to 1")
    return np.rint(values * 255).astype(np.uint8)


def _shaped(image: NDArray[np.uint8], layout: _Layout, shape: Shape) -> NDArray[np.uint8]:
    image_CHW = image[None] if layout.axes is None else image.transpose(layout.axes)
    if image_CHW.shape == shape:
        return image_CHW
    # From plain arrays, Pillow only copies and resizes; there is no format to decode.
    planes = [np.asarray(fit(Image.fromarray(np.ascontiguousarray(plane)), *shape[1:])) for plane in image_CHW]
    return np.stack(planes)


def _label_names(labels: Array, key: str, num_images: int) -> list[str]:
    if labels.dtype.kind not in "ui" or labels.shape not in ((num_images,), (num_images, 1)):
        raise DatasetInvalid(
            f"array {key}: {labels.dtype} of shape {_short(labels.shape)}; labels must be {num_images} integers"
        )
    if labels.min() < 0:
        raise DatasetInvalid(f"array {key}: labels must not be negative")
    values, ranks = np.unique(labels, return_inverse=True)
    names = [str(value) for value in values.tolist()]
    return [names[rank] for rank in ranks.reshape(-1).tolist()]


def _first(keys: tuple[str, ...], entries: Mapping[str, Entry]) -> str | None:
    return next((key for key in keys if key in entries), None)


def _short(value: object) -> str:
    return str(value)[:80]
