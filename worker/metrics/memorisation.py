"""Does a model repeat what it learned from? Samples' nearest training images against held-out ones'.

Distances are Euclidean, between pixels in [0, 1]. Shape suffixes: N = samples, M = others, D = pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The nearest of other images to each image: distance, float64 ``(N,)``, and position, int64 ``(N,)``."""

    distance: Tensor
    position: Tensor


def nearest(
    images_NCHW: Tensor, others_MCHW: Tensor, *, batch_size: int = 1000, on_batch: Callable[[], None] = lambda: None
) -> Nearest:
    """Look for each image's nearest other one; ``on_batch`` is called before each batch of others, and may raise.

    Beside the bytes there are never more numbers than a batch of images against a batch of others has.
    """
    parts = [_nearest(part, others_MCHW, batch_size, on_batch) for part in images_NCHW.split(batch_size)]
    distances, positions = zip(*((part.distance, part.position) for part in parts), strict=True)
    return Nearest(distance=torch.cat(distances), position=torch.cat(positions))


def _nearest(images_NCHW: Tensor, others_MCHW: Tensor, batch_size: int, on_batch: Callable[[], None]) -> Nearest:
    images_ND = _pixels(images_NCHW)
    distance_N = torch.full((len(images_ND),), inf, dtype=torch.float64)
    position_N = torch.zeros(len(images_ND), dtype=torch.int64)
    for start in range(0, len(others_MCHW), batch_size):
        on_batch()
        near_N, place_N = torch.cdist(images_ND, _pixels(others_MCHW[start : start + batch_size])).min(1)
        position_N = torch.where(near_N < distance_N, start + place_N, position_N)
        distance_N = torch.minimum(near_N, distance_N)
    return Nearest(distance=distance_N, position=position_N)


def _pixels(images_NCHW: Tensor) -> Tensor:
    return images_NCHW.flatten(1).double() / 255


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """Two tests that a model which draws afresh passes with one half."""

    nearer_to_train: Tensor
    """Whether each sample is nearer to a training image than to a held-out one, of equally many; float64 ``(N,)``,
    0.5 for ties."""
    copying: Tensor
    """Probability that each sample is nearer to the training images than a held-out image is (Meehan et al., 2020),
    float64 ``(N,)``: above one half on average, samples lie closer to the training set than fresh data do."""
    nearest: Nearest
    """The nearest of all training images to each sample."""

    def closest(self, num_pairs: int) -> list[tuple[int, int, float]]:
        """The closest pairs: position of the sample, of the training image, and the distance."""
        order = self.nearest.distance.argsort(stable=True)[:num_pairs].tolist()
        return [(i, int(self.nearest.position[i]), float(self.nearest.distance[i])) for i in order]


def memorisation(
    samples_NCHW: Tensor,
    train_MCHW: Tensor,
    held_out_MCHW: Tensor,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Memorisation:
    """Compare samples with both parts of the data; ValueError if one is empty."""
    if not min(len(samples_NCHW), len(train_MCHW), len(held_out_MCHW)):
        raise ValueError("samples, training images and held-out images are needed")
    to_train = nearest(samples_NCHW, train_MCHW, on_batch=on_batch)
    num = min(len(train_MCHW), len(held_out_MCHW))
    evenly = torch.arange(num) * len(train_MCHW) // num
    to_some = nearest(samples_NCHW, train_MCHW[evenly], on_batch=on_batch).distance
    to_held_out = nearest(samples_NCHW, held_out_MCHW[:num], on_batch=on_batch).distance
    fresh = nearest(held_out_MCHW, train_MCHW, on_batch=on_batch).distance
    return Memorisation(
        nearer_to_train=_wins(to_some, to_held_out),
        copying=_share_of_wins(to_train.distance, fresh),
        nearest=to_train,
    )


def _wins(a: Tensor, b: Tensor) -> Tensor:
    """1 where ``a`` is smaller, 0 where ``b`` is, one half for ties."""
    return (a < b).double() + 0.5 * (a == b).double()


def _share_of_wins(a_N: Tensor, b_M: Tensor) -> Tensor:
    """How many of ``b`` each of ``a`` is smaller than, a tie being one half, over how many there are: ``(N,)``."""
    sorted_M, num = b_M.sort().values, len(b_M)
    smaller_N, up_to_N = (torch.searchsorted(sorted_M, a_N, right=with_ties) for with_ties in (False, True))
    return (2 * num - smaller_N - up_to_N).double() / (2 * num)
