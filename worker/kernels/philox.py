"""Keyed noise (``worker.kernels.noise``) in one launch for all rows of a batch, whatever their seeds.

The uniform words are those of ``Noise`` bit for bit on any device, and so are its uniform numbers. Normals are made of
the same words by the same formula in float64; as devices differ in the last bit of its logarithm and cosine, about one
in 10^8 is rounded to a neighbouring float32.
"""

from math import prod

from torch import Tensor

from worker.kernels.choice import takes_triton
from worker.kernels.noise import Noise


def bits(noise: Noise, num_elements: int, *, stream: int = 0) -> Tensor:
    """``Noise.bits``: uniform 32-bit words, int64 of shape ``(B, num_elements)``."""
    if not takes_triton(noise.index_B):
        return noise.bits(num_elements, stream=stream)
    from worker.kernels.philox_triton import BITS, draw  # noqa: PLC0415 - Triton may not be installed

    return draw(noise, num_elements, stream=stream, kind=BITS)


def uniform(noise: Noise, *shape: int, stream: int = 0) -> Tensor:
    """``Noise.uniform``: numbers in (0, 1), float32 of shape ``(B, *shape)``."""
    if not takes_triton(noise.index_B):
        return noise.uniform(*shape, stream=stream)
    from worker.kernels.philox_triton import UNIFORM, draw  # noqa: PLC0415 - Triton may not be installed

    return draw(noise, prod(shape), stream=stream, kind=UNIFORM).reshape(-1, *shape)


def normal(noise: Noise, *shape: int, stream: int = 0) -> Tensor:
    """``Noise.normal``: standard normals, float32 of shape ``(B, *shape)``."""
    if not takes_triton(noise.index_B):
        return noise.normal(*shape, stream=stream)
    from worker.kernels.philox_triton import NORMAL, draw  # noqa: PLC0415 - Triton may not be installed

    return draw(noise, prod(shape), stream=stream, kind=NORMAL).reshape(-1, *shape)
