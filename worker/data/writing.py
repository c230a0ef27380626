"""Write canonical datasets: streamed to disk, split by content, the same bytes for the same samples.

A sample is held out if the SHA-256 of its canonical bytes falls into the lowest tenth, so equal samples are
always on the same side and ingesting again gives the same split. If that leaves a side empty, the sample
nearest to the border changes sides, with all that equal it; only a dataset whose samples are all equal has
nothing held out.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import numpy as np
from numpy.typing import NDArray

from shared.errors import DatasetInvalid
from shared.specs.spec import DatasetKind
from worker.data.dataset import CAPTIONS, HELD_OUT, IMAGE_SHARD, LABELS, OFFSETS, SPLIT, TRAIN

HELD_OUT_SHARE: Final = 0.1
SHARD_BYTES: Final = 256 << 20
MAX_CANONICAL_BYTES: Final = 64 << 30
MAX_CLASSES: Final = 10_000
MAX_SAMPLES: Final = 10_000_000

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What is known of the samples besides themselves, in their order."""

    labels: Sequence[str] | None = None
    captions: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Canonical:
    """A finished dataset on disk."""

    modality: DatasetKind
    count: int
    files: Mapping[str, Path]
    info: Mapping[str, Any] = field(default_factory=dict)


class ArrayFile:
    """An ``.npy`` file that grows along its first axis."""

    def __init__(self, path: Path, dtype: type[np.generic], item_shape: tuple[int, ...] = ()) -> None:
        self.path = path
        self._dtype = np.dtype(dtype)
        self._item_shape = item_shape
        self._count = 0
        self._file = path.open("wb")
        self._write_header()
        self._header_end = self._file.tell()

    def __len__(self) -> int:
        return self._count

    def append(self, items: Array) -> None:
        """Add items at the end."""
        self._file.write(np.ascontiguousarray(items, dtype=self._dtype).data)
        self._count += len(items)

    def release(self) -> None:
        """Close the file as it is: its header tells nothing of its items."""
        self._file.close()

    def close(self) -> None:
        """Write the final length into the header."""
        self._file.seek(0)
        # numpy pads headers so that the first axis can grow in place.
        self._write_header()
        if self._file.tell() != self._header_end:
            raise DatasetInvalid(f"{self.path.name}: too many items")
        self._file.close()

    def _write_header(self) -> None:
        shape = (self._count, *self._item_shape)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


class ImageWriter:
    """Images of one shape, written into shards."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shape = shape
        self._per_shard = max(1, shard_bytes // int(np.prod(shape)))
        self._shards: list[ArrayFile] = []
        self._keys = array("Q")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._shards:
            shard.release()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, image: NDArray[np.uint8]) -> None:
        """Append one image (C, H, W)."""
        canonical = np.ascontiguousarray(image)
        _remember(self._keys, hashlib.sha256(canonical.data).digest())
        self._shard().append(canonical[None])

    def finish(self, annotations: Annotations, info: Mapping[str, Any]) -> Canonical:
        """Close the shards, and write the split, the labels and the captions."""
        if self._shards:
            self._shards[-1].close()
        files = {shard.path.name: shard.path for shard in self._shards}
        split = split_by_content(self._keys)
        return finish(self._folder, "image", files, split, annotations, {"shape": list(self._shape), **info})

    def _shard(self) -> ArrayFile:
        if self._shards and len(self._shards[-1]) < self._per_shard:
            return self._shards[-1]
        if self._shards:
            self._shards[-1].close()
        path = self._folder / IMAGE_SHARD.format(len(self._shards))
        self._shards.append(ArrayFile(path, np.uint8, self._shape))
        return self._shards[-1]


class SequenceWriter:
    """Documents or recordings, written one after another into one array."""

    def __init__(self, folder: Path, modality: DatasetKind, name: str, dtype: type[np.generic]) -> None:
        self._folder = folder
        self._modality: DatasetKind = modality
        self._values = ArrayFile(folder / name, dtype)
        self._offsets = array("q", [0])
        self._keys = array("Q")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._values.release()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def num_values(self) -> int:
        """Length of the array so far."""
        return self._offsets[-1]

    def add(self, pieces: Iterable[Array]) -> None:
        """Append one sample, given in pieces. An empty one leaves no trace."""
        digest = hashlib.sha256()
        for piece in pieces:
            self._values.append(piece)
            digest.update(np.ascontiguousarray(piece).data)
        if len(self._values) > self._offsets[-1]:
            self._offsets.append(len(self._values))
            _remember(self._keys, digest.digest())

    def finish(
        self,
        annotations: Annotations,
        info: Mapping[str, Any],
        *,
        cut: Callable[[Array], int | None] | None = None,
    ) -> Canonical:
        """Close the array; ``cut`` may say where a lone sample parts into one to learn from and one held out."""
        self._values.close()
        split = split_by_content(self._keys)
        cut_at = cut(np.lib.format.open_memmap(self._values.path, mode="r")) if cut and len(self) == 1 else None
        if cut_at is not None:
            self._offsets.insert(1, cut_at)
            split = np.array([TRAIN, HELD_OUT], dtype=np.uint8)
        files = {self._values.path.name: self._values.path}
        files |= _save(self._folder, OFFSETS, np.array(self._offsets, dtype=np.int64))
        return finish(self._folder, self._modality, files, split, annotations, info)


def split_by_content(keys: Sequence[int]) -> NDArray[np.uint8]:
    """TRAIN or HELD_OUT for each sample (see the module's first lines)."""
    key_N = np.array(keys, dtype=np.uint64)
    held_out = key_N < np.uint64(int(HELD_OUT_SHARE * 2**64))
    if len(key_N) and key_N.min() != key_N.max():
        if not held_out.any():
            held_out = key_N == key_N.min()
        elif held_out.all():
            held_out = key_N != key_N.max()
    elif held_out.all():
        held_out = np.zeros(len(key_N), dtype=np.bool_)
    return np.where(held_out, np.uint8(HELD_OUT), np.uint8(TRAIN))


def finish(
    folder: Path,
    modality: DatasetKind,
    files: Mapping[str, Path],
    split: NDArray[np.uint8],
    annotations: Annotations,
    info: Mapping[str, Any],
) -> Canonical:
    """Write what all modalities share, and sum up."""
    if not len(split):
        raise DatasetInvalid("the upload holds no samples")
    files = {**files, **_save(folder, SPLIT, split)}
    counts = {"train": int((split == TRAIN).sum()), "held_out": int((split == HELD_OUT).sum())}
    nothing: dict[str, Any] = {"rejected": {"count": 0, "files": []}, "num_classes": 0, "classes": None}
    facts = {**nothing, **info, "counts": counts}
    if annotations.labels is not None:
        classes = sorted_classes(annotations.labels)
        rank = {name: label for label, name in enumerate(classes)}
        labels = np.array([rank[name] for name in annotations.labels], dtype=np.int64)
        files |= _save(folder, LABELS, labels)
        facts |= {"num_classes": len(classes), "classes": classes}
    if annotations.captions is not None:
        files[CAPTIONS] = folder / CAPTIONS
        with files[CAPTIONS].open("w", encoding="ascii") as file:
            file.writelines(json.dumps({"text": caption}) + "\n" for caption in annotations.captions)
    return Canonical(modality=modality, count=len(split), files=files, info=facts)


def sorted_classes(labels: Iterable[str]) -> list[str]:
    """Distinct class names; numbers in numerical order, anything else in code-point order."""
    names = set(labels)
    if len(names) > MAX_CLASSES:
        raise DatasetInvalid(f"the upload has {len(names)} classes; at most {MAX_CLASSES} are allowed")
    are_numbers = all(name.isascii() and name.isdigit() and len(name) < 20 for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if are_numbers else sorted(names)


def _remember(keys: "array[int]", digest: bytes) -> None:
    """The first 64 bits of a sample's digest decide on which side of the split it falls."""
    if len(keys) == MAX_SAMPLES:
        raise DatasetInvalid(f"the upload holds more than {MAX_SAMPLES} samples")
    keys.append(int.from_bytes(digest[:8], "big"))


def _save(folder: Path, name: str, array: Array) -> dict[str, Path]:
    np.save(folder / name, cast(Any, array), allow_pickle=False)
    return {name: folder / name}
