"""How many slots a network may be given at once without a sample's bits depending on its slot.

torch computes the last few elements of a pointwise operation, those that do not fill a vector register,
with another exponential than the rest; two threads cut the tensor in two and have two such ends. In a
tile, the end of the tensor belongs to the last slot. (Seen on a CPU with torch 2.13: the sigmoid of
8 x 1530 numbers changes in the last bit when rows are swapped.) So a tile is wider than one only
where every such tensor divides evenly. On a GPU every element takes the same path.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from worker.engine.dispatch import Onlooker
from worker.engine.memory import is_out_of_memory, release

WIDEST: Final[Mapping[str, int]] = {"cpu": 8, "cuda": 64}
"""The best width by kind of device. On CPUs 8 reaches most of the throughput of small networks."""

LONGEST_VECTOR: Final = 64
"""Elements that torch handles in one go: two AVX-512 registers of bfloat16."""
PARALLEL_GRAIN: Final = 32_768
"""Elements below which a pointwise operation stays on one thread (at::internal::GRAIN_SIZE)."""
CORRECTLY_ROUNDED: Final = frozenset(
    {"abs", "add", "ceil", "clamp", "clamp_max", "clamp_min", "clone", "copy_", "div", "eq", "floor", "ge", "gt", "le"}
    | {"lt", "maximum", "minimum", "mul", "ne", "neg", "reciprocal", "relu", "round", "sqrt", "sub", "where"}
)
"""Pointwise operations for which IEEE 754 leaves no choice."""


class _TailWatch(Onlooker):
    """Notices pointwise operations whose tensors do not divide into whole vectors."""

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.uneven: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if torch.Tag.pointwise in func.tags and name.removesuffix("_") not in CORRECTLY_ROUNDED:
            tensors = [tensor for tensor in (*args, output) if isinstance(tensor, Tensor)]
            if any(self._is_uneven(tensor) for tensor in tensors):
                self.uneven.add(name)
        return output

    def _is_uneven(self, tensor: Tensor) -> bool:
        # Numbers that are rounded from float64 to float32 afterwards do not show their last bit.
        if not tensor.is_floating_point() or tensor.dtype == torch.float64 or tensor.numel() <= self.num_slots:
            return False
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        num_threads = min(torch.get_num_threads(), -(-tensor.numel() // PARALLEL_GRAIN))
        return extent != tensor.numel() or tensor.numel() % (LONGEST_VECTOR * num_threads) != 0


def widest(step: Callable[[int], object], device: torch.device, below: int | None = None) -> int:
    """The best width at which ``step(width)`` gives every slot the same bits; ``step`` is tried out.

    ``below`` is a width that did not fit into memory: the next one is half of it, or less.
    """
    width = WIDEST.get(device.type, 1) if below is None else below // 2
    while width > 1 and device.type == "cpu":
        even = _is_even(step, width)
        if even is not None:
            return width if even else 1
        release(device)
        width //= 2
    return width


def _is_even(step: Callable[[int], object], width: int) -> bool | None:
    """Whether all slots of a tile of ``width`` are computed alike; None if it does not fit into memory."""
    try:
        with _TailWatch(width) as watch:
            step(width)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return not watch.uneven
