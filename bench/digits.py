"""MNIST digits from a folder of idx files: the first 8,000 to train on, the last 2,000 held out."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

IMAGES: Final = "mnist-t10k-images-idx3-ubyte.gz"
LABELS: Final = "mnist-t10k-labels-idx1-ubyte.gz"
NUM_TRAIN: Final = 8000


@dataclass(frozen=True, kw_only=True)
class Split:
    """Digits with their classes: uint8 ``(N, 1, 28, 28)`` and int64 ``(N,)``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Both parts."""

    train: Split
    held_out: Split


def read_digits(folder: Path) -> Digits:
    """Read the 10,000 digits of MNIST's test set, in their order."""
    images = torch.from_numpy(_idx(folder / IMAGES, 16).reshape(-1, 1, 28, 28))
    labels = torch.from_numpy(_idx(folder / LABELS, 8).astype(np.int64))
    return Digits(
        train=Split(images=images[:NUM_TRAIN], labels=labels[:NUM_TRAIN]),
        held_out=Split(images=images[NUM_TRAIN:], labels=labels[NUM_TRAIN:]),
    )


def _idx(path: Path, header_bytes: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header_bytes).copy()
