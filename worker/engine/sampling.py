"""Draws samples in a tile: a fixed number of slots that samples enter and leave between steps.

Kernels are chosen by shape, so a tile is always stepped as a whole, empty slots included. Then a
sample's bytes depend on (weights, request, index) and not on what else is being drawn, on its slot
or on the order of requests. Knows no family and no job.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from shared.errors import OutOfMemory
from worker.engine.memory import is_out_of_memory, release
from worker.engine.tile_width import widest
from worker.families.family import Draw, Sampler, Seeded, SlotState
from worker.kernels.noise import Domain, Noise

Reproducibility = Literal["exact", "same_hardware", "none"]
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


class Tile(Generic[RequestT]):
    """The slots of one network and sampler; ``example`` is any draw it will be asked for."""

    def __init__(
        self, net: nn.Module, sampler: Sampler, example: Draw[RequestT], device: torch.device, width: int | None = None
    ) -> None:
        self.net, self.sampler, self.device = net, sampler, device
        # Slots that nobody has entered yet hold the example, so that they are stepped on real numbers.
        self._example = self._start(example)
        self.width = width or widest(self._try, device)
        self._clear()

    def _try(self, width: int) -> None:
        self._stepped(_repeat(self._example, width))

    def _clear(self) -> None:
        self._state = _repeat(self._example, self.width)
        self._slots: list[_Occupant[RequestT] | None] = [None] * self.width

    @property
    def num_free(self) -> int:
        """Slots that ``admit`` can fill."""
        return self._slots.count(None)

    @property
    def is_empty(self) -> bool:
        return self.num_free == self.width

    @property
    def steps_done(self) -> int:
        """Steps that the samples in its slots have behind them."""
        taken = [occupant for occupant in self._slots if occupant is not None]
        return sum(self.sampler.num_steps(occupant.draw.request) - occupant.steps_left for occupant in taken)

    def admit(self, draws: Sequence[Draw[RequestT]]) -> None:
        """Put draws into free slots; ValueError if there are too many."""
        free = [slot for slot, occupant in enumerate(self._slots) if occupant is None]
        if len(draws) > len(free):
            raise ValueError(f"{len(draws)} draws do not fit into {len(free)} free slots")
        for slot, draw in zip(free, draws, strict=False):
            for name, row in self._start(draw).items():
                self._state[name][slot] = row[0]
            self._slots[slot] = _Occupant(draw=draw, steps_left=self.sampler.num_steps(draw.request))

    def step(self) -> list[tuple[Draw[RequestT], Tensor]]:
        """Advance every slot by one step; samples that are done leave, each with its draw."""
        self._state = self._stepped(self._state)
        taken = [(slot, occupant) for slot, occupant in enumerate(self._slots) if occupant is not None]
        for _, occupant in taken:
            occupant.steps_left -= 1
        leaving = [(slot, occupant.draw) for slot, occupant in taken if occupant.steps_left == 0]
        done = [(draw, self._finish(slot)) for slot, draw in leaving]
        for slot, _ in leaving:
            self._slots[slot] = None
        return done

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
        self.width = widest(self._try, self.device, below=self.width)
        self._clear()
        return draws

    def evict(self, unwanted: Callable[[Draw[RequestT]], bool]) -> None:
        """Free the slots of draws that nobody wants any more."""
        for slot, occupant in enumerate(self._slots):
            if occupant is not None and unwanted(occupant.draw):
                self._slots[slot] = None

    # A row starts and finishes alone: that costs little, and alone it has no neighbours.

    @torch.no_grad()
    def _start(self, draw: Draw[RequestT]) -> SlotState:
        keys = {STEP: 0, SEED: draw.request.seed, INDEX: draw.index}
        state = {name: torch.tensor([key], device=self.device) for name, key in keys.items()}
        return state | self.sampler.start([draw], _noise(state))

    @torch.no_grad()
    def _stepped(self, state: SlotState) -> SlotState:
        return state | self.sampler.step(self.net, state, _noise(state)) | {STEP: state[STEP] + 1}

    @torch.no_grad()
    def _finish(self, slot: int) -> Tensor:
        row = {name: tensor[slot : slot + 1].clone() for name, tensor in self._state.items()}
        return self.sampler.finish(self.net, row)[0].cpu()


def _noise(state: SlotState) -> Noise:
    return Noise(domain=Domain.SAMPLING, seed_B=state[SEED], step_B=state[STEP], index_B=state[INDEX])


def _repeat(row: SlotState, width: int) -> SlotState:
    return {name: tensor.expand(width, *tensor.shape[1:]).clone() for name, tensor in row.items()}


def sample(
    tile: Tile[RequestT], draws: Iterable[Draw[RequestT]], on_step: Callable[[int], None] = lambda done: None
) -> Iterator[tuple[Draw[RequestT], Tensor]]:
    """Draw all of ``draws``, yielding each sample as soon as it is done.

    Samples of equally many steps come in the order they were asked for. Where a step does not fit into memory the
    tile gets narrower, and what is not done by then begins again: see ``tile.width`` for what it came to.

    ``on_step`` is called after each step of the tile with the steps that all samples have behind them, but for the
    last one of each: that is counted by who takes the sample. What it raises ends the drawing.

    Raises:
        OutOfMemory: not even one sample fits.
    """
    waiting = deque(draws)
    left_behind = 0
    while waiting or not tile.is_empty:
        tile.admit([waiting.popleft() for _ in range(min(tile.num_free, len(waiting)))])
        done = _stepped(tile)
        if done is None:
            waiting.extendleft(reversed(tile.narrow()))
            done = []
        left_behind += sum(tile.sampler.num_steps(draw.request) - 1 for draw, _ in done)
        on_step(left_behind + tile.steps_done)
        yield from done


def _stepped(tile: Tile[RequestT]) -> list[tuple[Draw[RequestT], Tensor]] | None:
    """What a step finished; None if it did not fit into memory."""
    try:
        return tile.step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
