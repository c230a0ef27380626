"""Compiled code for a network that samples are drawn from: each shape of a step is compiled aside when it first comes.

Only for samples whose last bits nobody relies on (``determinism: relaxed``): code is taken into use between two steps,
when it is ready. Outlives jobs, as the network does.
"""

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final
from weakref import WeakKeyDictionary, finalize

import torch
from torch import nn

from worker.code_cache import CodeCache, is_whole
from worker.engine.blocks import Call, CompilationFailed, compile_blocks, plain, recorded, settled
from worker.engine.sampling import EvenTile, Tile
from worker.jobs.compiler import Compiler, code_name, order_of
from worker.jobs.loaded import LoadedModel


class Quickening:
    """The compilation of one network."""

    def __init__(self, model: LoadedModel, device: torch.device, cache: CodeCache) -> None:
        self._spec, self._data, self._numerics = model.spec, model.data, model.numerics
        self._device, self._cache = device, cache
        self._seen: set[Hashable] = set()
        self._new: dict[Call, None] = {}
        """What nobody compiles yet."""
        self._underway: list[Call] = []
        self._compiler: Compiler | None = None
        self.num_taken = 0
        """Ways of calling blocks that are compiled, and in use."""
        self.trouble: str | None = None
        """Why nothing more is compiled."""

    @contextmanager
    def step(self, net: nn.Module, shape: Hashable) -> Iterator[None]:
        """The context of a step of ``shape``, which tells apart steps that call blocks otherwise."""
        if self.trouble is None:
            self._go_on(net)
        if self.trouble is not None or shape in self._seen:
            with settled(is_compiled=self.num_taken > 0):
                yield
            return
        with settled(is_compiled=self.num_taken > 0), recorded(net) as calls:
            yield
        self._seen.add(shape)
        self._new |= dict.fromkeys(calls)
        self._go_on(net)

    def close(self) -> None:
        """Compile no more."""
        if self._compiler is not None:
            self._compiler.close()
            self._compiler = None

    def _go_on(self, net: nn.Module) -> None:
        try:
            if self._compiler is not None and self._compiler.is_done:
                self._take(net, self._compiler)
            if self._compiler is None and self._new:
                self._underway, self._new = list(self._new), {}
                about = self._spec, self._data, self._numerics, self._underway, self._cache
                self._compiler = Compiler(order_of("sampling", *about) | {"device": str(self._device)})
        except BlockingIOError:  # another worker compiles other shapes into it: the next step tries again
            return
        except (CompilationFailed, OSError) as error:
            plain(net)
            self.trouble, self.num_taken = str(error), 0
            self.close()

    def _take(self, net: nn.Module, compiler: Compiler) -> None:
        compiler.outcome()
        name = code_name("sampling", net, [], self._device)
        with self._cache.opened(name, alone=False, waits=False) as folder:
            if not is_whole(folder):
                raise CompilationFailed("the code on disk is not what was compiled")
            compile_blocks(net, self._underway, self._device, folder)
        self.num_taken += len(self._underway)
        self.close()


QUICKENINGS: Final[WeakKeyDictionary[nn.Module, Quickening]] = WeakKeyDictionary()
"""Those of networks that are loaded."""


def quickening_of(model: LoadedModel, device: torch.device, cache: CodeCache) -> Quickening:
    """The compilation of a model's network, begun with its first step."""
    if model.net not in QUICKENINGS:
        QUICKENINGS[model.net] = quickening = Quickening(model, device, cache)
        finalize(model.net, quickening.close)
    return QUICKENINGS[model.net]


def trouble_with(net: nn.Module) -> str | None:
    """Why a network is not computed by compiled code, if that was tried in vain."""
    return QUICKENINGS[net].trouble if net in QUICKENINGS else None


def quickened(tile: Tile[Any]) -> AbstractContextManager[None]:
    """The context of a tile's next step."""
    if not isinstance(tile, EvenTile) or not isinstance(tile.net, nn.Module) or tile.net not in QUICKENINGS:
        return nullcontext()
    return QUICKENINGS[tile.net].step(tile.net, (type(tile.sampler), tile.num_stepped))
