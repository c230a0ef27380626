"""Draws samples in a tile: a fixed number of slots that samples enter and leave between steps.

Kernels are chosen by shape, so a tile is always stepped as a whole, empty slots included. Then a
sample's bytes depend on (weights, request, index) and not on what else is being drawn, on its slot
or on the order of requests. Knows no family and no job.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor, nn

from shared.errors import NanLoss, OutOfMemory
from shared.reproduction import Reproducibility
from worker.engine.captured_calls import Called
from worker.engine.memory import is_out_of_memory, release
from worker.engine.tile_width import WIDEST, widest
from worker.families.family import IN_USE, Draw, Foreseeing, Sampler, Seeded, SlotState
from worker.kernels.noise import Domain, Noise

REPRODUCIBILITY: Final[Reproducibility] = "same_hardware"
"""Equal bytes are promised between workers whose fingerprints are equal."""
BY_CHANCE: Final[Reproducibility] = "none"
"""Memory ran out on the way: when it did decides about the bits, and no fingerprint tells."""

RequestT = TypeVar("RequestT", bound=Seeded)

STEP, SEED, INDEX = "noise.step", "noise.seed", "noise.index"
"""What the engine keeps of each slot beside the sampler's own state."""


@dataclass(kw_only=True)
class _Occupant(Generic[RequestT]):
    draw: Draw[RequestT]
    steps_left: int
    unbounded: frozenset[str]
    """Names of what was infinite before its first step, and is meant to be."""


class Tile(Generic[RequestT]):
    """The slots of one network and sampler; ``example`` is any draw it will be asked for."""

    def __init__(
        self,
        net: nn.Module | Called,
        sampler: Sampler,
        example: Draw[RequestT],
        device: torch.device,
        width: int | None = None,
    ) -> None:
        self.net, self.sampler, self.device = net, sampler, device
        # Slots that nobody has entered yet hold the example, so that they are stepped on real numbers.
        self._example = self._start(example)
        self.width = width or self._widest()
        self._clear()

    def _widest(self, below: int | None = None) -> int:
        return widest(lambda width: self._stepped(_repeat(self._example, width)), self.device, below=below)

    def _clear(self) -> None:
        nobody = {IN_USE: torch.zeros(self.width, dtype=torch.bool, device=self.device)}
        self._state = _repeat(self._example, self.width) | nobody
        self._slots: list[_Occupant[RequestT] | None] = [None] * self.width

    @property
    def num_free(self) -> int:
        """Slots that ``admit`` can fill."""
        return self._slots.count(None)

    @property
    def is_empty(self) -> bool:
        return self.num_free == self.width

    @property
    def underway(self) -> list[tuple[Draw[RequestT], int]]:
        """What is in its slots, each with the steps it has behind it."""
        taken = [occupant for occupant in self._slots if occupant is not None]
        return [(one.draw, self.sampler.num_steps(one.draw.request) - one.steps_left) for one in taken]

    @torch.no_grad()
    def look(self, draw: Draw[RequestT]) -> Tensor | None:
        """What one of its samples is going to be; None where the sampler cannot tell, or not yet."""
        for slot, occupant in enumerate(self._slots):
            if occupant is not None and occupant.draw is draw and isinstance(self.sampler, Foreseeing):
                return self.sampler.look(self.net, self._row(slot))[0].cpu()
        return None

    def admit(self, draws: Sequence[Draw[RequestT]]) -> None:
        """Put draws into free slots; ValueError if there are too many."""
        free = [slot for slot, occupant in enumerate(self._slots) if occupant is None]
        if len(draws) > len(free):
            raise ValueError(f"{len(draws)} draws do not fit into {len(free)} free slots")
        for slot, draw in zip(free, draws, strict=False):
            start = self._start(draw)
            for name, row in start.items():
                self._state[name][slot] = row[0]
            steps, unbounded = self.sampler.num_steps(draw.request), _unbounded(start)
            self._slots[slot] = _Occupant(draw=draw, steps_left=steps, unbounded=unbounded)

    def step(self) -> list[tuple[Draw[RequestT], Tensor | None]]:
        """Advance every slot by one step; samples that are done leave, each with its draw.

        None stands for a sample that came out as no number; its neighbours know nothing of it.
        """
        self._advance()
        taken = [(slot, occupant) for slot, occupant in enumerate(self._slots) if occupant is not None]
        for _, occupant in taken:
            occupant.steps_left -= 1
        leaving = [(slot, occupant) for slot, occupant in taken if occupant.steps_left == 0]
        done = [(occupant.draw, self._finish(slot)) for slot, occupant in leaving]
        self._free([slot for slot, _ in leaving])
        return done

    def makes_room(self) -> bool:
        """Let go of what was recorded of its network's calls; False if there is nothing, and steps need less memory."""
        is_roomier = isinstance(self.net, Called) and self.net.make_room()
        if is_roomier:
            release(self.device)
        return is_roomier

    def narrow(self) -> list[Draw[RequestT]]:
        """Make the tile half as wide, or less, because a step did not fit into memory.

        Returns the draws that were in it, which is empty now: what was computed at another width is not kept.

        Raises:
            OutOfMemory: it has one slot.
        """
        if self.width == 1:
            raise OutOfMemory("not even one sample fits into memory beside the model")
        draws = [occupant.draw for occupant in self._slots if occupant is not None]
        self._state = {}
        release(self.device)
        self.width = self._widest(below=self.width)
        self._clear()
        return draws

    def evict(self, unwanted: Callable[[Draw[RequestT]], bool]) -> None:
        """Free the slots of draws that nobody wants any more."""
        taken = [(slot, occupant) for slot, occupant in enumerate(self._slots) if occupant is not None]
        self._free([slot for slot, occupant in taken if unwanted(occupant.draw)])

    def _free(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._slots[slot] = None
            self._state[IN_USE][slot] = False

    def _advance(self) -> None:
        self._state = self._stepped(self._state)

    # A row starts and finishes alone: that costs little, and alone it has no neighbours.

    def _start(self, draw: Draw[RequestT]) -> SlotState:
        return started(self.sampler, draw, self.device)

    @torch.no_grad()
    def _stepped(self, state: SlotState) -> SlotState:
        return state | self.sampler.step(self.net, state, _noise(state)) | {STEP: state[STEP] + 1}

    def _row(self, slot: int) -> SlotState:
        return {name: tensor[slot : slot + 1].clone() for name, tensor in self._state.items()}

    @torch.no_grad()
    def _finish(self, slot: int) -> Tensor | None:
        row, occupant = self._row(slot), self._slots[slot]
        unbounded = occupant.unbounded if occupant is not None else frozenset[str]()
        if _unbounded(row) - unbounded or any(bool(row[name].isnan().any()) for name in unbounded):
            return None
        return self.sampler.finish(self.net, row)[0].cpu()


def _unbounded(row: SlotState) -> frozenset[str]:
    """Names of what is infinite, or no number."""
    floats = {name: tensor for name, tensor in row.items() if tensor.is_floating_point()}
    return frozenset(name for name, tensor in floats.items() if not bool(tensor.isfinite().all()))


@torch.no_grad()
def started(sampler: Sampler, draw: Draw[Any], device: torch.device) -> SlotState:
    """The slot of one draw as it is before its first step."""
    keys = {STEP: 0, SEED: draw.request.seed, INDEX: draw.index, IN_USE: True}
    state = {name: torch.tensor([key], device=device) for name, key in keys.items()}
    return state | sampler.start([draw], _noise(state))


def signature(sampler: Sampler, draw: Draw[Any], device: torch.device) -> Hashable:
    """What draws must have in common, beside network and sampler, to share a tile."""
    state = started(sampler, draw, device)
    return tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(state.items()))


class LooseTile(Tile[RequestT]):
    """A tile of which only the slots in use are stepped: faster while it is not full, and the number of neighbours
    decides about the last bits of a sample."""

    def _widest(self, below: int | None = None) -> int:
        return WIDEST.get(self.device.type, 1) if below is None else below // 2

    @property
    def num_stepped(self) -> int:
        """Rows of the next step."""
        return self.width - self.num_free

    def _advance(self) -> None:
        taken = torch.tensor([slot for slot, occupant in enumerate(self._slots) if occupant], device=self.device)
        # The last slot stands for rows that nobody needs.
        padded = torch.cat((taken, taken[-1:].expand(self.num_stepped - len(taken))))
        given = {name: tensor[padded] for name, tensor in self._state.items()}
        given[IN_USE][len(taken) :] = False
        rows = self._stepped(given)
        for name, tensor in rows.items():
            whole = self._state.setdefault(name, tensor.new_zeros(self.width, *tensor.shape[1:]))
            whole[taken] = tensor[: len(taken)]


class EvenTile(LooseTile[RequestT]):
    """A loose tile that steps one, two, four, eight ... rows, so that code is compiled for few shapes."""

    @property
    def num_stepped(self) -> int:
        return min(self.width, 1 << max(0, super().num_stepped - 1).bit_length())


def _noise(state: SlotState) -> Noise:
    return Noise(domain=Domain.SAMPLING, seed_B=state[SEED], step_B=state[STEP], index_B=state[INDEX])


def _repeat(row: SlotState, width: int) -> SlotState:
    return {name: tensor.expand(width, *tensor.shape[1:]).clone() for name, tensor in row.items()}


class Line(Generic[RequestT]):
    """A tile and the draws that wait for its slots; they may be of different owners, and more may come at any time.

    A slot that is free goes to the owner who has the fewest, so that who wants one sample does not wait for all of who
    wants thousands. An owner's samples of equally many steps come in the order they were asked for.
    """

    def __init__(self, tile: Tile[RequestT]) -> None:
        self.tile = tile
        self._waiting: dict[Any, deque[Draw[RequestT]]] = {}
        """By owner, whose turn it is first; none is empty."""
        self.resting: Collection[Any] = ()
        """Owners whose draws wait on, whatever is free."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to step."""
        return self.tile.is_empty and all(owner in self.resting for owner in self._waiting)

    @property
    def is_empty(self) -> bool:
        return not self._waiting and self.tile.is_empty

    @property
    def draws(self) -> list[Draw[RequestT]]:
        """All that is in it."""
        return [*(draw for draw, _ in self.tile.underway), *chain.from_iterable(self._waiting.values())]

    @property
    def room(self) -> int:
        """How many more owners would have a slot soon: each slot that nothing waits for, or what would be one more
        owner's share."""
        num_waiting = sum(map(len, self._waiting.values()))
        owners = {*self._waiting, *(draw.owner for draw, _ in self.tile.underway)}
        return max(self.tile.num_free - num_waiting, max(2, self.tile.width) // (len(owners) + 1))

    def add(self, draws: Iterable[Draw[RequestT]]) -> None:
        for draw in draws:
            self._waiting.setdefault(draw.owner, deque()).append(draw)

    def step(self) -> list[tuple[Draw[RequestT], Tensor | None]]:
        """Fill free slots, advance all of them and return what is done (``Tile.step``).

        Where a step does not fit into memory the tile gets narrower, and what is not done by then begins again: see
        ``tile.width`` for what it came to.

        Raises:
            OutOfMemory: not even one sample fits.
        """
        try:
            self._fill()
            return self.tile.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Not in the handler: there the error still holds its frames, and they the tensors.
        if not self.tile.makes_room():
            for draw in reversed(self.tile.narrow()):
                self._waiting.setdefault(draw.owner, deque()).appendleft(draw)
        return []

    def _fill(self) -> None:
        slots = Counter(draw.owner for draw, _ in self.tile.underway)
        while self.tile.num_free and (owners := [owner for owner in self._waiting if owner not in self.resting]):
            owner = min(owners, key=slots.__getitem__)
            self.tile.admit([self._waiting[owner][0]])
            slots[owner] += 1
            waiting = self._waiting.pop(owner)
            waiting.popleft()
            if waiting:  # behind those who have as many slots, so that they take turns
                self._waiting[owner] = waiting

    def evict(self, unwanted: Callable[[Draw[RequestT]], bool]) -> None:
        """Forget draws that nobody wants any more, wherever they are."""
        self.tile.evict(unwanted)
        wanted = [draw for waiting in self._waiting.values() for draw in waiting if not unwanted(draw)]
        self._waiting = {}
        self.add(wanted)


def sample(
    tile: Tile[RequestT], draws: Iterable[Draw[RequestT]], on_step: Callable[[int], None] = lambda done: None
) -> Iterator[tuple[Draw[RequestT], Tensor]]:
    """Draw all of ``draws``, yielding each sample as soon as it is done.

    ``on_step`` is called after each step of the tile with the steps that all samples have behind them, but for the
    last one of each: that is counted by who takes the sample. What it raises ends the drawing.

    Raises:
        OutOfMemory: not even one sample fits.
        NanLoss: a sample came out as no number.
    """
    line = Line(tile)
    line.add(draws)
    left_behind = 0
    while not line.is_empty:
        done = line.step()
        left_behind += sum(tile.sampler.num_steps(draw.request) - 1 for draw, _ in done)
        on_step(left_behind + sum(steps for _, steps in tile.underway))
        for draw, made in done:
            if made is None:
                raise no_number(draw)
            yield draw, made


def no_number(draw: Draw[Any]) -> NanLoss:
    """The error that a sample stands for which came out as no number."""
    return NanLoss(f"sample {draw.index} came out as no number: the model or what was asked of it is too extreme")
