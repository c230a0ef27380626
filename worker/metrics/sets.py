"""Every figure that compares a set of samples with a set of real images, by the name it is asked for.

Shape suffixes: N = samples, M = reference images, D = features.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from worker.kernels.noise import Domain, Noise
from worker.metrics.coverage import NUM_NEIGHBOURS, coverage
from worker.metrics.distances import diversity, frechet_distance, kernel_distance, sliced_wasserstein
from worker.metrics.features import CPU
from worker.metrics.figure import Estimate, jackknifed

Statistics = Mapping[str, float]

FEWEST: Final = NUM_NEIGHBOURS + 1
"""Images that a set must have to be compared."""
SET_METRICS: Final[Mapping[str, Callable[[Tensor, Tensor], Statistics]]] = {
    "frechet_distance": lambda x_ND, y_MD: {"frechet_distance": frechet_distance(x_ND, y_MD)},
    "kernel_distance": lambda x_ND, y_MD: {"kernel_distance": kernel_distance(x_ND, y_MD)},
    "mind": lambda x_ND, y_MD: {"mind": sliced_wasserstein(x_ND, y_MD)},
    "coverage": lambda x_ND, y_MD: vars(coverage(x_ND, y_MD)),
    "diversity": lambda x_ND, y_MD: {"diversity": diversity(x_ND)},
}
"""Figures of features ``(N, D)`` against ``(M, D)``."""


def compare(
    samples_ND: Tensor,
    reference_MD: Tensor,
    metrics: Collection[str],
    *,
    on_evaluation: Callable[[], None] = lambda: None,
) -> dict[str, Estimate]:
    """Those of ``metrics`` that are in ``SET_METRICS``.

    ``on_evaluation`` is called before each of the many passes over the sets, and may raise.
    """
    estimates: dict[str, Estimate] = {}
    for name, metric in SET_METRICS.items():
        if name not in metrics:
            continue

        def statistics(rows: Tensor, metric: Callable[[Tensor, Tensor], Statistics] = metric) -> Statistics:
            on_evaluation()
            return metric(samples_ND[rows], reference_MD)

        estimates |= jackknifed(statistics, len(samples_ND))
    return estimates


def values(samples_ND: Tensor, reference_MD: Tensor, metrics: Collection[str]) -> dict[str, float]:
    """The same without intervals, for baselines."""
    wanted = [metric(samples_ND, reference_MD) for name, metric in SET_METRICS.items() if name in metrics]
    return {name: value for one in wanted for name, value in one.items()}


def pixel_noise(image_NCHW: Tensor, num_images: int) -> Tensor:
    """The trivial generator: each pixel on its own, normal with its mean and deviation over the images, as bytes."""
    values_NCHW = image_NCHW.float()
    noise = Noise.of_step(Domain.EVALUATION, 0, 0, range(num_images), CPU)
    drawn = values_NCHW.mean(0) + values_NCHW.std(0) * noise.normal(*image_NCHW.shape[1:])
    return drawn.clamp(0, 255).round().to(torch.uint8)


def digest(*sets_NCHW: Tensor) -> str:
    """SHA-256 of sets of images, one after the other: of each its shape, then its bytes in order."""
    return digest_of_parts(*((image_NCHW.shape, [image_NCHW]) for image_NCHW in sets_NCHW))


def digest_of_parts(*sets: tuple[Sequence[int], Iterable[Tensor]]) -> str:
    """``digest`` of sets of which each is given as its shape ``(N, C, H, W)`` and its images part by part."""
    sha256 = hashlib.sha256()
    for shape, parts in sets:
        sha256.update(f"{'x'.join(map(str, shape))}\n".encode())
        for image_BCHW in parts:
            sha256.update(image_BCHW.contiguous().numpy().data)
    return sha256.hexdigest()
