"""Alters the images of a training batch, each as keyed numbers say: the same on any device, however it is cut up.

Shape suffixes: B = batch, C = channels, H, W = height and width.
"""

from typing import Final

import torch
from torch import Tensor

from shared.specs.augmentation import Augmentation
from worker.families.family import Batch
from worker.kernels.noise import Noise

NUM_DRAWS: Final = 6
"""Uniform numbers of one image: flip, shift down and right, brightness, contrast, saturation."""


def augmented(batch: Batch, asked: Augmentation, noise: Noise) -> Batch:
    """The batch with its images (uint8 ``(B, C, H, W)``) altered; images of several names independently."""
    if not asked.alters:
        return batch
    images = [name for name, tensor in batch.items() if tensor.ndim == 4]
    draws = {name: noise.uniform(NUM_DRAWS, stream=stream) for stream, name in enumerate(images)}
    return {**batch, **{name: altered(batch[name], asked, draws[name]) for name in images}}


def altered(image_BCHW: Tensor, asked: Augmentation, u_BU: Tensor) -> Tensor:
    """Images altered as ``NUM_DRAWS`` numbers in (0, 1) each say."""
    flip_B, down_B, right_B, *colours = u_BU.double().unbind(1)
    if asked.moves:
        is_mirrored_B = flip_B < asked.flip
        image_BCHW = torch.where(is_mirrored_B[:, None, None, None], image_BCHW.flip(-1), image_BCHW)
        image_BCHW = moved(image_BCHW, 2, pixels(down_B, asked.shift))
        image_BCHW = moved(image_BCHW, 3, pixels(right_B, asked.shift))
    return recoloured(image_BCHW, asked, *colours) if asked.recolours else image_BCHW


def pixels(u_B: Tensor, most: int) -> Tensor:
    """A whole number from ``-most`` to ``most``, each equally likely."""
    return (u_B * (2 * most + 1)).long() - most


def moved(image_BCHW: Tensor, axis: int, by_B: Tensor) -> Tensor:
    """Images moved along an axis, mirrored at their edges; the edge itself is not repeated."""
    size = image_BCHW.shape[axis]
    period = max(1, 2 * (size - 1))
    place_BN = (torch.arange(size, device=by_B.device) - by_B[:, None]) % period
    place_BN = torch.minimum(place_BN, period - place_BN).clamp(max=size - 1)
    shape = [-1, 1, 1, 1]
    shape[axis] = size
    return image_BCHW.gather(axis, place_BN.view(shape).expand_as(image_BCHW))


def recoloured(
    image_BCHW: Tensor, asked: Augmentation, brightness_B: Tensor, contrast_B: Tensor, saturation_B: Tensor
) -> Tensor:
    """Images with other brightness, contrast and saturation, in this order, rounded to bytes at the end."""
    x_BCHW = image_BCHW.double() * factor(brightness_B, asked.brightness)
    mean_B111 = x_BCHW.mean((1, 2, 3), keepdim=True)
    x_BCHW = mean_B111 + (x_BCHW - mean_B111) * factor(contrast_B, asked.contrast)
    grey_B1HW = x_BCHW.mean(1, keepdim=True)
    x_BCHW = grey_B1HW + (x_BCHW - grey_B1HW) * factor(saturation_B, asked.saturation)
    return x_BCHW.round().clamp(0, 255).to(image_BCHW.dtype)


def factor(u_B: Tensor, most: float) -> Tensor:
    """A number evenly spread from ``1 - most`` to ``1 + most``, as ``(B, 1, 1, 1)``."""
    return (1 + most * (2 * u_B - 1))[:, None, None, None]
