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

from worker.engine.tile_width import widest
from worker.families.family import Draw, Sampler, Seeded, SlotState
from worker.kernels.noise import Domain, Noise

Reproducibility = Literal["exact", "same_hardware", "none"]
REPRODUCIBILITY: Final[Reproducibility] = "same_hardware"
"""Equal bytes are promised between workers whose fingerprints are equal."""

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
        row = self._start(example)
        self.width = width or widest(lambda width: self._stepped(_repeat(row, width)), device)
        self._state = _repeat(row, self.width)
        self._slots: list[_Occupant[RequestT] | None] = [None] * self.width

    @property
    def num_free(self) -> int:
        """Slots that ``admit`` can fill."""
        return self._slots.count(None)

    @property
    def is_empty(self) -> bool:
        return self.num_free == self.width

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
        done: list[tuple[Draw[RequestT], Tensor]] = []
        for slot, occupant in enumerate(self._slots):
            if occupant is None:
                continue
            occupant.steps_left -= 1
            if occupant.steps_left == 0:
                done.append((occupant.draw, self._finish(slot)))
                self._slots[slot] = None
        return done

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
        return self.sampler.finish(row)[0].cpu()


def _noise(state: SlotState) -> Noise:
    return Noise(domain=Domain.SAMPLING, seed_B=state[SEED], step_B=state[STEP], index_B=state[INDEX])


def _repeat(row: SlotState, width: int) -> SlotState:
    return {name: tensor.expand(width, *tensor.shape[1:]).clone() for name, tensor in row.items()}


def sample(tile: Tile[RequestT], draws: Iterable[Draw[RequestT]]) -> Iterator[tuple[Draw[RequestT], Tensor]]:
    """Draw all of ``draws``, yielding each sample as soon as it is done.

    Samples of equally many steps come in the order they were asked for.
    """
    waiting = deque(draws)
    while waiting or not tile.is_empty:
        tile.admit([waiting.popleft() for _ in range(min(tile.num_free, len(waiting)))])
        yield from tile.step()
