"""Triton's kernel of ``worker.kernels.philox``: Philox-4x32-10 (Salmon et al., SC 2011) in registers."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.choice import launch
from worker.kernels.noise import MULTIPLIERS, ROUNDS, STREAM_BITS, WEYL, Noise

BITS, UNIFORM, NORMAL = (tl.constexpr(kind) for kind in range(3))
"""What is made of the words."""
MULTIPLIER0, MULTIPLIER1 = (tl.constexpr(multiplier) for multiplier in MULTIPLIERS)
WEYL0, WEYL1 = (tl.constexpr(increment) for increment in WEYL)
NUM_ROUNDS = tl.constexpr(ROUNDS)
BLOCKS: Final = 256
"""Counters of a program, four words each."""


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Four words for each counter and key, all uint32, which wraps around."""
    for _ in tl.static_range(NUM_ROUNDS):  # pyright: ignore[reportGeneralTypeIssues] - not run as Python
        low0, high0 = c0 * MULTIPLIER0, tl.umulhi(c0, tl.full(c0.shape, MULTIPLIER0, tl.uint32))
        low2, high2 = c2 * MULTIPLIER1, tl.umulhi(c2, tl.full(c2.shape, MULTIPLIER1, tl.uint32))
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 += WEYL0
        k1 += WEYL1
    return c0, c1, c2, c3


@triton.jit
def _polar(first, second):
    """Two normals of two words (Box and Muller, 1958)."""
    u = (first.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    angle = (second.to(tl.float64) + 0.5) * 2.3283064365386963e-10 * 6.283185307179586
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _made_of(words0, words1, words2, words3, KIND: tl.constexpr):
    """The numbers of four words."""
    if KIND == NORMAL:
        words0, words1 = _polar(words0, words1)
        words2, words3 = _polar(words2, words3)
    elif KIND == UNIFORM:
        words0 = ((words0 >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        words1 = ((words1 >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        words2 = ((words2 >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        words3 = ((words3 >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return words0, words1, words2, words3


@triton.jit
def _draw(
    seed_B,
    step_B,
    index_B,
    drawn,
    purpose,
    num_elements,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Some of the numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    nought = tl.full((BLOCKS,), 0, tl.uint32)
    seed = tl.load(seed_B + row)
    words0, words1, words2, words3 = _philox(
        block.to(tl.uint32),
        nought + tl.load(index_B + row).to(tl.uint32),
        nought + tl.load(step_B + row).to(tl.uint32),
        (nought + purpose).to(tl.uint32),
        nought + seed.to(tl.uint32),
        nought + (seed >> 32).to(tl.uint32),
    )
    words0, words1, words2, words3 = _made_of(words0, words1, words2, words3, KIND)
    in_order = tl.interleave(tl.interleave(words0, words2), tl.interleave(words1, words3))
    place = tl.program_id(1) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    tl.store(drawn + row * num_elements + place, in_order.to(drawn.dtype.element_ty), mask=place < num_elements)


def draw(noise: Noise, num_elements: int, *, stream: int = 0, kind: tl.constexpr) -> Tensor:
    """``num_elements`` numbers of each row: int64 for ``BITS``, else float32."""
    seed_B, step_B, index_B = (key.long().contiguous() for key in (noise.seed_B, noise.step_B, noise.index_B))
    dtype = torch.int64 if kind == BITS else torch.float32
    drawn = torch.empty(len(index_B), num_elements, dtype=dtype, device=noise.device)
    num_programs = triton.cdiv(num_elements, 4 * BLOCKS)
    if drawn.numel() == 0:
        return drawn
    purpose = noise.domain << STREAM_BITS | stream
    modes = {"KIND": kind, "BLOCKS": BLOCKS}
    launch(_draw, (len(index_B), num_programs), seed_B, step_B, index_B, drawn, purpose, num_elements, **modes)
    return drawn
