"""Work that a GPU is told once and then told to repeat, as CUDA graphs: when it is recorded, what it reads, and when
it is launched one kernel after the other all the same. Knows no network, no training and no sampler.

Whatever differs from one time to the next is read from tensors that stay in their place. What Python decides is
recorded as it was decided: calls of which that may differ are of different *kinds*, and each kind is a graph of its
own. The first call of a kind is plain and the second a rehearsal, computed on the stream that records; the third is
recorded, which computes nothing, and then replayed like all that follow.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

MOST_KINDS: Final = 4
"""Kinds that are remembered: each graph holds the memory of its work. Those not asked for for longest go first."""
WAITED: Final = "called a synchronizing CUDA operation"
"""How torch says that main memory waited for the device, which a graph cannot do."""

Tensors = Mapping[str, Tensor]
Act = Callable[[], Tensors]


class Recorder(Protocol):
    """A device that can record what it is told. Both methods do ``act`` on the same tensors."""

    def rehearse(self, act: Act) -> tuple[Tensors, str | None]:
        """Do it as it will be recorded, and say why it cannot be, if so."""
        ...

    def record(self, act: Act) -> tuple[Callable[[], object], Tensors]:
        """What does it from now on, and where its results will be; nothing is computed meanwhile.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        ...


class CudaRecorder:
    """CUDA graphs (``torch.cuda.CUDAGraph``)."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def rehearse(self, act: Act) -> tuple[Tensors, str | None]:
        usual, before = torch.cuda.current_stream(self._stream.device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(usual)
        with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(self._stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                made = act()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        usual.wait_stream(self._stream)
        places = [f"{Path(one.filename).name}, line {one.lineno}" for one in caught if WAITED in str(one.message)]
        return made, f"main memory waits for the device in {places[0]}" if places else None

    def record(self, act: Act) -> tuple[Callable[[], object], Tensors]:
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: what others do, who store what is done, is neither to fail nor to make this fail.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            made = act()
        return graph.replay, made


@dataclass
class _Held:
    """What calls of one kind read, and what repeats them."""

    num_done: int = 0
    given: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    replay: Callable[[], object] | None = None
    made: Tensors = field(default_factory=dict[str, Tensor])

    def read(self, given: Tensors) -> None:
        """Put into its place what this call is given."""
        if not self.given:
            self.given = {name: torch.empty_like(tensor) for name, tensor in given.items()}
        for name, place in self.given.items():
            place.copy_(given[name], non_blocking=True)


class Repeats:
    """Calls that are recorded where that can be; without a recorder all are plain."""

    def __init__(self, recorder: Recorder | None = None, trouble: str | None = None) -> None:
        self._recorder, self.trouble = recorder, trouble
        """The latter: why nothing is recorded any more, where that was asked for."""
        self.num_recorded = 0
        self.is_static = False
        """Whether what is being computed is a rehearsal or is recorded: it must read nothing but what it is given."""
        self.is_recording = False
        self._kinds: OrderedDict[Hashable, _Held] = OrderedDict()

    @property
    def is_on(self) -> bool:
        return self._recorder is not None

    def call(self, kind: Hashable, given: Tensors, act: Callable[[Tensors], Tensors]) -> Tensors:
        """``act`` on ``given``, in one way or another; what it returns lasts until the next call."""
        if self._recorder is None:
            return act(given)
        held = self._held((kind, tuple((name, one.shape, one.stride(), one.dtype) for name, one in given.items())))
        held.num_done += 1
        if held.num_done == 1:
            return act(given)
        held.read(given)
        if held.num_done == 2:
            return self._rehearsed(self._recorder, lambda: act(held.given))
        if held.replay is None and not self._is_recorded(self._recorder, held, lambda: act(held.given)):
            return act(given)
        if held.replay is not None:
            held.replay()
        return held.made

    def make_room(self) -> bool:
        """Let go of what was recorded, and record no more; False if there is nothing to let go of."""
        is_holding = any(held.replay is not None for held in self._kinds.values())
        if is_holding:
            self._give_up("memory ran out beside what was recorded")
        return is_holding

    def _give_up(self, reason: str) -> None:
        self._recorder, self.trouble = None, reason
        self._kinds.clear()

    def _held(self, kind: Hashable) -> _Held:
        held = self._kinds.setdefault(kind, _Held())
        self._kinds.move_to_end(kind)
        if len(self._kinds) > MOST_KINDS:
            self._kinds.popitem(last=False)
        return held

    def _rehearsed(self, recorder: Recorder, act: Act) -> Tensors:
        with self._static():
            made, trouble = recorder.rehearse(act)
        if trouble is not None:
            self._give_up(trouble)
        return made

    def _is_recorded(self, recorder: Recorder, held: _Held, act: Act) -> bool:
        trouble, self.is_recording = None, True
        try:
            with self._static():
                held.replay, held.made = recorder.record(act)
        except RuntimeError as error:
            said = str(error).strip().splitlines() or [""]
            trouble = f"{type(error).__name__}: {said[0][:200]}"
        finally:
            self.is_recording = False
        # Not in the handler: there the error still holds its frames, and they what was recorded.
        if trouble is not None:
            self._give_up(trouble)
            return False
        self.num_recorded += 1
        return True

    @contextmanager
    def _static(self) -> Iterator[None]:
        self.is_static = True
        try:
            yield
        finally:
            self.is_static = False
