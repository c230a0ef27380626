"""Keeps the networks that were used last, within a number of bytes. Knows no job and no storage."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Final

from torch import nn

from worker.engine.memory import room

SHARE: Final = 4
"""Networks may fill one in so many parts of the memory, unless it is said how much."""
WHERE_NOBODY_TELLS: Final = 2 * 2**30


class ModelCache:
    """Networks by what identifies their weights. Those unused for longest leave first, those in use never. For one
    thread."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        """When left out, a share of the memory that is free as the first network has been loaded, and its own."""
        self._networks: OrderedDict[Hashable, nn.Module] = OrderedDict()
        self._uses: Counter[Hashable] = Counter()

    def take(self, key: Hashable, load: Callable[[], nn.Module]) -> nn.Module:
        """The network of ``key``, loaded unless it is here. It stays until ``give_back``, whatever the limit is."""
        if key not in self._networks:
            self._networks[key] = load()
        self._networks.move_to_end(key)
        self._uses[key] += 1
        self.drop_unused(self._limit())
        return self._networks[key]

    def give_back(self, key: Hashable) -> None:
        """Say that one who took it needs it no longer."""
        self._uses[key] -= 1
        self.drop_unused(self._limit(), but=key)

    def drop_unused(self, limit_bytes: int = 0, *, but: Hashable = None) -> None:
        """Forget networks that nobody uses until the rest takes no more than ``limit_bytes``, if that can be."""
        left = self.size_bytes
        for key in [key for key in self._networks if not self._uses[key] and key != but]:
            if left <= limit_bytes:
                return
            left -= size_bytes(self._networks.pop(key))

    def _limit(self) -> int:
        if self.limit_bytes is None:
            devices = {tensor.device for net in self._networks.values() for tensor in net.state_dict().values()}
            left = [room(device) for device in devices]
            known = [num_bytes for num_bytes in left if num_bytes is not None]
            self.limit_bytes = (min(known) + self.size_bytes) // SHARE if known else WHERE_NOBODY_TELLS
        return self.limit_bytes

    @property
    def keys(self) -> list[Any]:
        """What identifies the weights of those that are here."""
        return list(self._networks)

    @property
    def size_bytes(self) -> int:
        return sum(size_bytes(net) for net in self._networks.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._networks


def size_bytes(net: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())


MODELS: Final = ModelCache()
"""The models of this process, kept between jobs."""
