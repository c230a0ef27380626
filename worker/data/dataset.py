"""Canonical datasets, as a training loop reads them: arrays on disk, mapped into memory, never copied whole.

An image dataset is ``images-00000.npy``, ``images-00001.npy``, … (uint8, NCHW), a text dataset ``tokens.npy``
(uint8) with ``offsets.npy``, an audio dataset ``samples.npy`` (int16) with ``offsets.npy``. Each has ``split.npy``
and may have ``labels.npy`` and ``captions.jsonl``. ``worker.data.writing`` writes them; this module knows
neither archives nor jobs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.errors import DatasetInvalid

TRAIN: Final = 0
HELD_OUT: Final = 1

SPLIT: Final = "split.npy"
LABELS: Final = "labels.npy"
CAPTIONS: Final = "captions.jsonl"
OFFSETS: Final = "offsets.npy"
TOKENS: Final = "tokens.npy"
SAMPLES: Final = "samples.npy"
IMAGE_SHARD: Final = "images-{:05d}.npy"

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """What every dataset knows of its samples, whatever they are."""

    split: NDArray[np.uint8]
    """``TRAIN`` or ``HELD_OUT`` for each sample."""
    labels: NDArray[np.int64] | None
    """Class of each sample, or None for a dataset without classes."""
    captions_path: Path | None

    def __len__(self) -> int:
        return len(self.split)

    @cached_property
    def train_indices(self) -> NDArray[np.int64]:
        """Samples to learn from, ascending."""
        return np.flatnonzero(self.split == TRAIN)

    @cached_property
    def held_out_indices(self) -> NDArray[np.int64]:
        """Samples to measure on, ascending. Empty only if all samples of the dataset are equal."""
        return np.flatnonzero(self.split == HELD_OUT)

    @cached_property
    def num_classes(self) -> int:
        """Zero for a dataset without classes."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @cached_property
    def captions(self) -> Sequence[str] | None:
        """Text that describes each sample, or None."""
        if self.captions_path is None:
            return None
        captions = [json.loads(line)["text"] for line in self.captions_path.read_text("utf-8").splitlines()]
        _require(len(captions) == len(self), CAPTIONS, f"has {len(captions)} lines for {len(self)} samples")
        return captions


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDataset(Samples):
    """Images of one shape, in shards."""

    shards: Sequence[NDArray[np.uint8]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.shards[0].shape[1:]
        return channels, height, width

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(len(shard) for shard in self.shards[:-1])], dtype=np.int64)

    def gather(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Copy the images at ``indices`` (any order, repeats allowed) into one (B, C, H, W) array.

        Raises:
            IndexError: an index is negative or not below ``len(self)``.
        """
        wanted = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"image index out of range for {len(self)} images")
        batch = np.empty((len(wanted), *self.shape), dtype=np.uint8)
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for shard in np.unique(shard_of):
            rows = shard_of == shard
            batch[rows] = self.shards[shard][wanted[rows] - self._starts[shard]]
        return batch


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceDataset(Samples):
    """Documents or recordings, one after another in one long array."""

    values: Array
    """uint8 bytes of UTF-8 (text) or int16 samples (audio)."""
    offsets: NDArray[np.int64]
    """Sample ``i`` is ``values[offsets[i]:offsets[i + 1]]``."""

    def sequence(self, index: int) -> Array:
        """One document or recording, as a view on the file."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]


def open_images(files: Mapping[str, Path]) -> ImageDataset:
    """Map an image dataset into memory; ``files`` gives the path of each canonical file.

    Raises:
        DatasetInvalid: a file is missing, or does not fit the others.
    """
    shards = [_mapped(files, name, np.uint8, ndim=4) for name in _shard_names(files)]
    same_shape = len({shard.shape[1:] for shard in shards}) == 1
    _require(same_shape, IMAGE_SHARD.format(0), "differs in shape from another shard")
    return ImageDataset(shards=shards, **_sample_facts(files, sum(len(shard) for shard in shards)))


def open_text(files: Mapping[str, Path]) -> SequenceDataset:
    """Map a text dataset into memory."""
    return _open_sequences(files, TOKENS, np.uint8)


def open_audio(files: Mapping[str, Path]) -> SequenceDataset:
    """Map an audio dataset into memory."""
    return _open_sequences(files, SAMPLES, np.int16)


def _open_sequences(files: Mapping[str, Path], name: str, dtype: type[np.generic]) -> SequenceDataset:
    values = _mapped(files, name, dtype, ndim=1)
    offsets = _mapped(files, OFFSETS, np.int64, ndim=1)
    ascending = bool((np.diff(offsets) >= 0).all())
    _require(ascending and offsets[0] == 0 and offsets[-1] == len(values), OFFSETS, f"does not describe {name}")
    return SequenceDataset(values=values, offsets=offsets, **_sample_facts(files, len(offsets) - 1))


def _shard_names(files: Mapping[str, Path]) -> Sequence[str]:
    num_shards = sum(name.startswith("images-") for name in files)
    names = [IMAGE_SHARD.format(shard) for shard in range(max(num_shards, 1))]
    for name in names:
        _require(name in files, name, "is missing")
    return names


def _sample_facts(files: Mapping[str, Path], num_samples: int) -> dict[str, Any]:
    split = _mapped(files, SPLIT, np.uint8, ndim=1)
    _require(len(split) == num_samples, SPLIT, f"has {len(split)} entries for {num_samples} samples")
    _require(bool((split <= HELD_OUT).all()), SPLIT, "has entries that are neither 0 nor 1")
    labels = _mapped(files, LABELS, np.int64, ndim=1) if LABELS in files else None
    if labels is not None:
        _require(len(labels) == num_samples, LABELS, f"has {len(labels)} entries for {num_samples} samples")
        _require(bool((labels >= 0).all()), LABELS, "has negative entries")
    return {"split": split, "labels": labels, "captions_path": files.get(CAPTIONS)}


def _mapped(files: Mapping[str, Path], name: str, dtype: type[np.generic], *, ndim: int) -> Array:
    _require(name in files, name, "is missing")
    try:
        array = np.lib.format.open_memmap(files[name], mode="r")
    except (ValueError, OSError) as error:
        raise DatasetInvalid(f"dataset file {name}: {error}") from error
    found = f"is {array.dtype} of shape {array.shape}"
    _require(array.dtype == dtype and array.ndim == ndim and array.shape[0] > 0, name, found)
    return array


def _require(condition: object, name: str, problem: str) -> None:
    """Raise unless ``condition`` holds."""
    if not condition:
        raise DatasetInvalid(f"dataset file {name} {problem}")
