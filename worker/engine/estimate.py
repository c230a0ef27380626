"""What drawing a sample or a training takes of memory at least, found out without taking any.

The operations are done on tensors that have a shape and no memory (torch's device ``meta``), and the bytes of those
alive at one time are added up. What kernels need for themselves, and what they may do in place, is not counted: what is
refused by this figure could not have been done, and what is not may still run out of memory. Knows no job.
"""

import logging
from collections.abc import Callable
from copy import deepcopy
from math import prod
from typing import Any, Final
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from shared.errors import OutOfMemory
from shared.specs.training import TrainSpec
from worker.engine.dispatch import Onlooker
from worker.engine.memory import release, room
from worker.engine.models import MODELS, size_bytes
from worker.engine.sampling import started
from worker.engine.training import build
from worker.families.family import DataInfo, Draw, Family, Sampler, SlotState
from worker.kernels.noise import Domain, Noise

logger = logging.getLogger(__name__)

META: Final = torch.device("meta")
MOST_ALIVE: Final = 64
"""More tensors than these, each as wide as the network's widest weight at the size of a sample, are never alive at one
time in a network of ours: where so many fit there is nothing to find out."""
_aten: Final = torch.ops.aten


class _Fused(TorchFunctionMode):
    """Takes attention for one kernel that keeps no scores, and SiLU for one that works in place."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return args[0] if func is F.silu else func(*args, **(kwargs or {}))


class _Weightless(Onlooker):
    """Computes with tensors of ``meta`` as far as these reach, and counts the bytes that are alive.

    ``builds``: what is made without content, as weights are before they are drawn, is one of these.
    """

    def __init__(self, *, builds: bool = False) -> None:
        super().__init__()
        self._builds = builds
        self._alive: dict[int, tuple[Any, int]] = {}
        self._num_bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named: dict[str, Any] = dict(kwargs or {})
        given = _tensors((args, named))
        if self._builds and func is _aten.empty.memory_format:
            named["device"] = META
        if any(one.is_meta for one in given):
            if func is _aten._local_scalar_dense.default:  # noqa: SLF001 (its name)
                return True  # of a number that nobody computed, and mostly the answer to "are there any"
            args, named = tree_map(_weightless, (args, named))
        output = func(*args, **named)
        known = {_storage(one) for one in given}
        for one in _tensors(output):
            if _storage(one) not in known:
                self._count(one)
        return output

    def _count(self, tensor: Tensor) -> None:
        key, storage = _storage(tensor), tensor.untyped_storage()
        if key not in self._alive:
            self._alive[key] = ref(storage, lambda _: self._forget(key)), storage.nbytes()
            self._num_bytes += storage.nbytes()
            self.peak = max(self.peak, self._num_bytes)

    def _forget(self, key: int) -> None:
        self._num_bytes -= self._alive.pop(key)[1]


def _tensors(tree: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001 (what tells storages apart)


def _weightless(value: Any) -> Any:
    return value.to(META) if isinstance(value, Tensor) else META if isinstance(value, torch.device) else value


def _peak(act: Callable[[], object], *, builds: bool = False) -> int | None:
    """Bytes alive at one time in ``act``; None where it asks what only numbers can tell."""
    try:
        with torch.no_grad(), _Weightless(builds=builds) as counted, _Fused():
            act()
    except Exception as error:  # noqa: BLE001  (no estimate is no reason to fail)
        logger.info("no estimate of memory: %r", error)
        return None
    return counted.peak


def start_bytes(sampler: Sampler, draw: Draw[Any]) -> int | None:
    """Bytes that the beginning of one sample takes, or None."""
    return _peak(lambda: sampler.start([draw], _noise()))


def step_bytes(net: nn.Module, sampler: Sampler, state: SlotState) -> int | None:
    """Bytes that one step of one sample takes beside the network and the sample's ``state``, or None."""
    weights = {id(one): nn.Parameter(one.detach().to(META), requires_grad=False) for one in net.parameters()}
    twin = deepcopy(net, weights)
    return _peak(lambda: sampler.step(twin, dict(state), _noise()))


def _noise() -> Noise:
    key_B = torch.zeros(1, dtype=torch.int64, device=META)
    return Noise(domain=Domain.SAMPLING, seed_B=key_B, step_B=key_B, index_B=key_B)


def training_bytes(family: Family[Any, Any], spec: TrainSpec, data: DataInfo) -> int | None:
    """Bytes of a training's weights and their average, gradients and moments of two orders, or None."""
    built: list[nn.Module] = []
    if _peak(lambda: built.append(build(family, spec, data)), builds=True) is None:
        return None
    [net] = built
    trained = sum(one.numel() * one.element_size() for one in net.parameters() if one.requires_grad)
    return 2 * size_bytes(net) + 3 * trained


def _is_surely_small(net: nn.Module, shape: tuple[int, ...], left: int) -> bool:
    """Whether a step for samples of ``shape`` fits into ``left`` bytes without looking further."""
    widest = max((max(one.shape) for one in net.parameters() if one.ndim > 0), default=1)
    return MOST_ALIVE * widest * prod(shape) * torch.float64.itemsize <= left


def require_sample(
    net: nn.Module, sampler: Sampler, draw: Draw[Any], shape: tuple[int, ...], device: torch.device
) -> None:
    """See that one sample, of ``shape``, can be drawn on ``device``, where the network is already.

    Raises:
        OutOfMemory: it cannot.
    """
    left = room(device)
    if left is None or _is_surely_small(net, shape, left):
        return
    beside = f"beside the {_said(size_bytes(net))} of its model"
    require(start_bytes(sampler, draw), device, f"beginning one sample, {beside},")
    state = started(sampler, draw, device)
    require(step_bytes(net, sampler, state), device, f"a step of one sample, {beside},")


def require(num_bytes: int | None, device: torch.device, purpose: str) -> None:
    """See that ``device`` has so many bytes for ``purpose``, if need be without the models that are kept there unused.

    Raises:
        OutOfMemory: it has not.
    """
    left = room(device)
    if num_bytes is None or left is None or num_bytes <= left:
        return
    MODELS.drop_unused()
    release(device)
    left = room(device) or 0
    if num_bytes > left:
        raise OutOfMemory(f"{purpose} takes at least {_said(num_bytes)} of memory, and {device} has {_said(left)} left")


def _said(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB ({num_bytes} bytes)"
