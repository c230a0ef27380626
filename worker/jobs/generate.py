"""Serves ``generate`` jobs, whatever the task, as many at once as there is room for.

Jobs that ask the same of one model share each step of its network. A job joins between two steps and leaves when its
samples are stored; what it gets is what it would have got alone. What fails for one job ends that one; where a step
fails for several, each of them is to be tried alone.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import nn

from shared.errors import OutOfMemory
from worker.engine.captured_calls import called
from worker.engine.estimate import require_sample
from worker.engine.memory import is_out_of_memory
from worker.engine.numerics import exact
from worker.engine.sampling import EvenTile, Line, LooseTile, Tile, signature
from worker.families.family import Draw
from worker.jobs.inputs import fetch_ahead
from worker.jobs.kept import fetch_kept
from worker.jobs.loaded import LoadedModel
from worker.jobs.order import MOST_UNSTORED, Order
from worker.jobs.quickening import quickened, quickening_of, trouble_with
from worker.run import Desk, Parted, Run

logger = logging.getLogger(__name__)

_LOOK_EVERY: Final = 0.02
"""Seconds between two looks for new jobs while all that is left is being stored."""

FETCHED_AT_ONCE: Final = 4
"""Jobs whose inputs are fetched at one time."""

FITTING: Final[WeakKeyDictionary[nn.Module, set[Hashable]]] = WeakKeyDictionary()
"""What has been asked of networks before, of which a sample fits into memory."""
WIDTHS: Final[WeakKeyDictionary[nn.Module, dict[Hashable, int]]] = WeakKeyDictionary()
"""How wide the tiles of networks are, which is found out by trying."""


def serve(desk: Desk) -> None:
    """Draw what the jobs at ``desk`` ask for, until none is left; equal requests to equal weights give equal bytes.

    Where memory runs out it goes on with a narrower tile. That is another tile, and other last bits: the fingerprint
    names it, unless some samples were drawn with the wider one.
    """
    fetching = ThreadPoolExecutor(FETCHED_AT_ONCE, "fetch")
    try:
        with exact():
            service = _Service(desk, fetching)
            while service.goes_on():
                pass
    finally:
        fetching.shutdown(wait=False, cancel_futures=True)


def generate(run: Run) -> dict[str, Any]:
    """Draw the samples of one job, and return its result.

    Raises:
        Stopped: on request.
        ModelLoadFailed: the weights do not fit their description.
        OutOfMemory: not even one sample fits.
        NanLoss: a sample came out as no number.
    """
    desk = _OwnDesk(run)
    serve(desk)
    return desk.result()


class _OwnDesk:
    """A desk that one job comes to."""

    def __init__(self, run: Run) -> None:
        self.device = run.device
        self._coming = [run]
        self.result: Callable[[], dict[str, Any]]

    def arrivals(self) -> Sequence[Run]:
        arrived, self._coming = self._coming, []
        return arrived

    def room(self, samples: int) -> None:
        """Nobody else comes."""

    def settle(self, run: Run, result: Callable[[], dict[str, Any]]) -> None:
        self.result = result


class _Service:
    """The jobs being served, and the tiles that they share."""

    def __init__(self, desk: Desk, fetching: ThreadPoolExecutor) -> None:
        self._desk, self._fetching = desk, fetching
        self._device = torch.device(desk.device)
        self._coming: list[tuple[Run, Future[None]]] = []
        """Jobs whose inputs are being fetched, while others are stepped."""
        self._orders: list[Order] = []
        self._lines: dict[Hashable, Line[Any]] = {}

    def goes_on(self) -> bool:
        """Do one step of every tile; False when nothing is left to do."""
        for run in self._desk.arrivals():
            run.phase("loading_model")
            self._coming.append((run, self._fetched(run)))
        if not self._orders:
            wait([fetched for _, fetched in self._coming], _LOOK_EVERY, FIRST_COMPLETED)
        self._open_fetched()
        if not self._orders:
            return bool(self._coming)
        self._desk.room(self._room)
        stepped = [self._step(line) for line in list(self._lines.values())]
        underway = self._underway()
        for order in list(self._orders):
            self._look_after(order, underway.get(order, []))
        if not any(stepped):
            wait([one for order in self._orders for one in order.waits_for], _LOOK_EVERY, FIRST_COMPLETED)
        return True

    @property
    def _room(self) -> int:
        # Nobody else is asked in while it is not known what those on their way will take, or while others wait.
        if self._coming or not self._lines or any(order.gives_way for order in self._orders):
            return 0
        return next(reversed(self._lines.values())).room

    def _fetched(self, run: Run) -> "Future[None]":
        """Done once its inputs are here; not begun if its model does not fit into memory."""
        model = run.assignment.inputs["model"]
        is_loaded = LoadedModel.is_loaded(model, self._device)
        if not is_loaded:
            try:
                LoadedModel.require_memory(model, self._device)
            except OutOfMemory as error:
                refused: Future[None] = Future()
                refused.set_exception(error)
                return refused
        return self._fetching.submit(_fetch, run, weights=not is_loaded)

    def _open_fetched(self) -> None:
        """Begin the jobs whose inputs are here, in the order they came."""
        fetched = [one for one in self._coming if one[1].done()]
        self._coming = [one for one in self._coming if one not in fetched]
        for run, inputs in fetched:
            self._open(run, inputs)

    def _open(self, run: Run, inputs: Future[None]) -> None:
        try:
            inputs.result()
            order = Order(run, self._device)
            try:
                line = self._line_of(order)
                line.add(order.left_to_draw(line.tile.width))
            except BaseException:
                order.close()
                raise
        except BaseException as error:  # noqa: BLE001  (it ends this job, and the desk says how)
            is_crowded = bool(self._orders) and (is_out_of_memory(error) or isinstance(error, OutOfMemory))
            self._desk.settle(run, partial(_raise, Parted() if is_crowded else error))
        else:
            self._orders.append(order)

    def _line_of(self, order: Order) -> Line[Any]:
        """The line in which its draws can share steps with others, put last."""
        net, example = order.model.net, order.draws[0]
        self._require_memory(order, example)
        shapes = (
            order.request.task,
            order.is_exact,
            order.request.captured,
            signature(order.sampler, example, self._device),
        )
        if order.request.captured:
            order.called = called(net, self._device)
        if order.request.compiled:
            quickening_of(order.model, self._device, order.run.code_cache)
        line = self._lines.pop((id(net), shapes), None)
        if line is None:
            widths = WIDTHS.setdefault(net, {})
            kind = Tile if order.is_exact else EvenTile if order.request.compiled else LooseTile
            line = Line(kind(order.called or net, order.sampler, example, self._device, widths.get(shapes)))
            widths[shapes] = line.tile.width
        # Those that nobody uses any more take memory.
        self._lines = {key: one for key, one in self._lines.items() if not one.is_empty} | {(id(net), shapes): line}
        return line

    def _require_memory(self, order: Order, example: Draw[Any]) -> None:
        """See that what the order asks for can be drawn, unless that was seen before."""
        given = example.inputs or {}
        asked = order.request.task, *(tuple(tensor.shape) for tensor in given.values())
        fitting = FITTING.setdefault(order.model.net, set())
        if asked not in fitting:
            require_sample(order.model.net, order.sampler, example, order.model.data.shape, self._device)
            fitting.add(asked)

    def _step(self, line: Line[Any]) -> bool:
        """Whether there was anything to do."""
        line.resting = {order for order in self._orders if order.gives_way}
        if line.is_idle or sum(order.num_unstored for order in self._orders) > MOST_UNSTORED:
            return False
        try:
            with quickened(line.tile):
                done = line.step()
        except Exception as error:  # noqa: BLE001  (it ends those whose step this was)
            self._break_up(line, error)
            return True
        for draw, sample in done:
            for order in [one for one in self._orders if one is draw.owner]:
                self._guarded(order, partial(order.take, draw, sample, line.tile.width))
        for order in list(self._orders):
            self._guarded(order, partial(order.show, line.tile))
        return True

    def _guarded(self, order: Order, act: Callable[[], object]) -> bool:
        """Do what concerns one job; what it raises ends that job."""
        try:
            act()
        except BaseException as error:  # noqa: BLE001  (the desk says how it ended)
            self._end(order, partial(_raise, error))
            return False
        return True

    def _break_up(self, line: Line[Any], error: Exception) -> None:
        """The step failed: end the job that it was for; several may be tried again, each alone."""
        orders = [order for order in self._orders if any(draw.owner is order for draw in line.draws)]
        # Memory that one job does not find may be what another one has.
        neighbours = self._orders if isinstance(error, OutOfMemory) else orders
        is_known = len(neighbours) == 1
        if not is_known:
            logger.error("a step failed for %d jobs", len(orders), exc_info=error)
        for order in orders:
            self._end(order, partial(_raise, error if is_known else Parted()))
        self._lines = {key: one for key, one in self._lines.items() if one is not line}

    def _underway(self) -> dict[Any, list[int]]:
        steps: dict[Any, list[int]] = {}
        for line in self._lines.values():
            for draw, behind in line.tile.underway:
                steps.setdefault(draw.owner, []).append(behind)
        return steps

    def _look_after(self, order: Order, underway: list[int]) -> None:
        order.tell(order.called.trouble if order.called is not None else trouble_with(order.model.net))
        if not self._guarded(order, partial(order.report, underway)):
            return
        if order.lost:
            self._guarded(order, lambda: self._line_of(order).add(order.lost))
            order.lost = []
        elif order.is_done:
            self._end(order, order.result)

    def _end(self, order: Order, result: Callable[[], dict[str, Any]]) -> None:
        self._orders.remove(order)
        order.close()
        for line in self._lines.values():
            line.evict(lambda draw: draw.owner is order)
        self._desk.settle(order.run, result)


def _fetch(run: Run, *, weights: bool) -> None:
    fetch_ahead(run, weights=weights)
    fetch_kept(run)


def _raise(error: BaseException) -> Any:
    raise error
