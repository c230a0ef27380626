"""Calls of networks in a sampler's step that are recorded once and repeated (``worker.engine.capture``), for all
networks of one architecture together: the graph reads one copy of weights, into which those of whoever is called are
copied.

A class of networks that says ``is_called_whole`` is called by its samplers with tensors alone, and computes from
nothing but these and its weights. Knows no family and no sampler.
"""

from collections import OrderedDict
from collections.abc import Hashable
from copy import deepcopy
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any, Final
from weakref import ref

import torch
from torch import Tensor, nn

from worker.engine.capture import CudaRecorder, Recorder, Repeats
from worker.engine.models import size_bytes

MOST_BYTES: Final = 256 * 2**20
"""Of weights: copying these costs a GPU about a tenth of a millisecond, and a step that reads more does not wait for
launches."""
MOST_ARCHITECTURES: Final = 4
"""Architectures whose copy and graphs are kept; those not asked for for longest go first."""
_OWN: Final = frozenset(vars(nn.Module()))
"""What every module has."""


def architecture_of(net: nn.Module) -> Hashable:
    """What two networks have in common that do the same with their weights; each is its own where nobody can tell."""
    modules = [(name, type(module), module.training) for name, module in net.named_modules()]
    said = [sorted(one for one in vars(module).items() if one[0] not in _OWN) for module in net.modules()]
    if not all(_is_plain(value) for of_module in said for _, value in of_module):
        return object()
    forms = [(name, one.shape, one.stride(), one.dtype, one.device) for name, one in _named(net)]
    return repr((modules, said, forms))


def _is_plain(value: Any) -> bool:
    """Whether ``repr`` tells all of it."""
    if isinstance(value, tuple | list):
        return all(_is_plain(one) for one in value)
    if is_dataclass(value):
        return all(_is_plain(getattr(value, one.name)) for one in fields(value))
    return value is None or isinstance(value, bool | int | float | str)


def _named(net: nn.Module) -> list[tuple[str, Tensor]]:
    return [*chain(net.named_parameters(), net.named_buffers())]


class SharedCalls:
    """The calls of networks of one architecture."""

    def __init__(self, net: nn.Module, recorder: Recorder) -> None:
        self.repeats = Repeats(recorder)
        self._net = deepcopy(net)
        self._weights = [tensor for _, tensor in _named(self._net)]
        self._whose = ref(net)

    def call(self, net: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """What ``net`` makes of ``inputs``, as a tensor of its own."""
        if not self.repeats.is_on:
            return net(*inputs)
        self._take_over(net)
        given = {str(place): tensor for place, tensor in enumerate(inputs)}
        made = self.repeats.call(None, given, lambda given: {"made": self._net(*given.values())})
        return made["made"].clone()

    @torch.no_grad()
    def _take_over(self, net: nn.Module) -> None:
        if self._whose() is not net:
            theirs = [tensor for _, tensor in _named(net)]
            torch._foreach_copy_(self._weights, theirs)  # pyright: ignore[reportPrivateImportUsage]
            self._whose = ref(net)


class Called:
    """A network, for samplers: calls of it are repeated where that can be. Its weights do not change meanwhile."""

    def __init__(self, net: nn.Module, shared: SharedCalls | None, trouble: str | None = None) -> None:
        self.plain, self._shared, self._trouble = net, shared, trouble

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def __call__(self, *inputs: Tensor) -> Tensor:
        # What autocast has rounded of weights it keeps for longer than a call, and a graph for ever.
        is_cast = torch.is_autocast_enabled(inputs[0].device.type)
        if self._shared is None or is_cast or torch.is_grad_enabled():
            return self.plain(*inputs)
        return self._shared.call(self.plain, inputs)

    @property
    def trouble(self) -> str | None:
        """Why its calls are not repeated."""
        return self._trouble if self._shared is None else self._shared.repeats.trouble

    def make_room(self) -> bool:
        """Let go of what was recorded, and record no more; False if there is nothing to let go of."""
        return self._shared is not None and self._shared.repeats.make_room()


_SHARED: Final[OrderedDict[Hashable, SharedCalls]] = OrderedDict()
"""Of this process, for one thread."""


def called(net: nn.Module, device: torch.device) -> Called:
    """``net`` on ``device``, its calls shared with all of its architecture."""
    reasons = {
        "the device is no GPU": device.type != "cuda",
        "its samplers call parts of the network": not getattr(net, "is_called_whole", False),
        "the network is too large to gain by it": size_bytes(net) > MOST_BYTES,
    }
    trouble = next((reason for reason, is_so in reasons.items() if is_so), None)
    if trouble is not None:
        return Called(net, None, trouble)
    key = architecture_of(net)
    shared = _SHARED.pop(key, None) or SharedCalls(net, CudaRecorder(device))
    _SHARED[key] = shared
    if len(_SHARED) > MOST_ARCHITECTURES:
        _SHARED.popitem(last=False)
    return Called(net, shared)
