"""Keeps the networks that were used last, within a number of bytes. Knows no job and no storage."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

from torch import nn

DEFAULT_BYTES: Final = 2 * 2**30


class ModelCache:
    """Networks by what identifies their weights; the longest unused leave first. For one thread."""

    def __init__(self, limit_bytes: int = DEFAULT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._networks: OrderedDict[Hashable, nn.Module] = OrderedDict()

    def get(self, key: Hashable, load: Callable[[], nn.Module]) -> nn.Module:
        """The network of ``key``, loaded unless it is here. The one returned may alone exceed the limit."""
        if key not in self._networks:
            self._networks[key] = load()
        self._networks.move_to_end(key)
        while len(self._networks) > 1 and self.size_bytes > self.limit_bytes:
            self._networks.popitem(last=False)
        return self._networks[key]

    @property
    def size_bytes(self) -> int:
        return sum(size_bytes(net) for net in self._networks.values())

    def clear(self) -> None:
        """Forget all of them, so that their memory can be used for something else."""
        self._networks.clear()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._networks


def size_bytes(net: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())


MODELS: Final = ModelCache()
"""The models of this process, kept between jobs."""
