"""A recorder for the CPU, as strict as CUDA's: it notes each operation of torch, with the very tensors it read and
wrote, and does these again. Nothing of Python is executed once more, so what a step was told in Python stays as it was.

While it records, nothing is computed: what was there before is put back, and what was made is no number until the first
repetition. Operations that main memory waits for are refused.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from worker.engine.capture import Act, Tensors

ASKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten._unique2.default)


def tensors_in(*about: Any) -> list[Tensor]:
    return [one for one in tree_flatten(about)[0] if isinstance(one, Tensor)]


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Watch(TorchDispatchMode):
    """Notes whether main memory waited."""

    waits = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits |= func in ASKS
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """The operations of one step."""

    def __init__(self) -> None:
        super().__init__()
        self._played: list[tuple[Any, Any, Any, list[Tensor], list[bool]]] = []
        self._own: dict[int, Tensor] = {}
        """What was made meanwhile, by where it lies, kept so that no other takes its place."""
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for written in self._written(func, args, kwargs):
            if place(written) not in self._own:
                self._before.setdefault(id(written), (written, written.detach().clone()))
        made = func(*args, **kwargs)
        given = {place(one) for one in tensors_in(args, kwargs)}
        outputs = tensors_in(made)
        is_new = [place(one) not in given for one in outputs]
        self._own |= {place(one): one for one, new in zip(outputs, is_new, strict=True) if new}
        if torch.Tag.inplace_view not in func.tags:  # it has changed what the tensor is taken for, once and for all
            # Not the tensors themselves: those may be taken for other shapes later.
            self._played.append((func, args, kwargs, [one.detach() for one in outputs], is_new))
        return made

    def _written(self, func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
        named = func._schema.arguments
        for number, argument in enumerate(named):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[number] if number < len(args) else kwargs.get(argument.name)
                yield from tensors_in(given)

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, kept in self._before.values():
            tensor.copy_(kept)
        for made in self._own.values():
            if made.is_floating_point():
                made.fill_(torch.nan)

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, outputs, is_new in self._played:
            made = tensors_in(func(*args, **kwargs))
            for one, again, new in zip(outputs, made, is_new, strict=True):
                if new:
                    one.copy_(again)


class TapeRecorder:
    """What ``worker.engine.capture.Recorder`` asks for."""

    def __init__(self) -> None:
        self.num_played = 0

    def rehearse(self, act: Act) -> tuple[Tensors, str | None]:
        with Watch() as watch:
            values = act()
        return values, "main memory waits" if watch.waits else None

    def record(self, act: Act) -> tuple[Callable[[], object], Tensors]:
        tape = Tape()
        try:
            with tape:
                values = act()
        finally:
            tape.put_back()

        def replay() -> None:
            self.num_played += 1
            tape.play()

        return replay, values
