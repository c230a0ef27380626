"""One ``generate`` job: what it asks for, and what becomes of its samples as they are drawn.

Samples are encoded and stored by a thread of the job's own, in the order they were drawn, so that the network never
waits for storage.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import prod
from typing import Any, Final

import torch
from pydantic import TypeAdapter
from torch import Tensor

from shared.reproduction import Reproducibility
from shared.specs import GenerateSpec
from shared.specs.tasks import Generate, Interpolate, Request, Sampling, Traverse
from worker.engine.captured_calls import Called
from worker.engine.estimate import require
from worker.engine.numerics import fingerprint
from worker.engine.sampling import BY_CHANCE, REPRODUCIBILITY, Tile, no_number
from worker.families.family import DataInfo, Draw
from worker.jobs.inputs import fetch_task_inputs
from worker.jobs.kept import LOST, Keeper, kept, num_kept
from worker.jobs.loaded import LoadedModel
from worker.jobs.pictures import encode_png, sheet
from worker.jobs.samples import publish_encoded, publish_sample, publish_sheet, read_sample
from worker.run import Run, Stopped, StoredObject

REQUEST: Final[TypeAdapter[Request]] = TypeAdapter(GenerateSpec)

MAIN_MEMORY: Final = torch.device("cpu")
MOST_IN_SHEET: Final = 256
"""Samples beyond these are published alone."""
MOST_SHOWN: Final = 4
"""Samples in a preview."""
MOST_UNSTORED: Final = 64
"""Samples that may wait for storage; then no more are drawn."""


class Order:
    """A job on its way: ``draws`` go into a tile, ``take`` what comes out, until ``is_done``."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.run, self.device = run, device
        self.request = REQUEST.validate_python(dict(run.assignment.spec))
        given = run, run.assignment.inputs["model"], device, self.request.precision
        self.model = LoadedModel.load(*given, is_compiled=self.request.compiled)
        try:
            self._prepare()
        except BaseException:
            self.model.close()
            raise

    def _prepare(self) -> None:
        run = self.run
        self.sampler = self.model.sampler(self.request.task)
        require(self._held_bytes, MAIN_MEMORY, "keeping samples until they are stored")
        self.draws = _draws(run, self.request, self.model.data, owner=self)
        self._steps = {draw.index: self.sampler.num_steps(draw.request) for draw in self.draws}
        self._num_steps = sum(self._steps.values())
        self._steps_behind = 0
        self._width: int | None = None
        self._is_told = False
        self.called: Called | None = None
        """The network, where calls of it are to be repeated."""
        self._reproducibility: Reproducibility = REPRODUCIBILITY
        self._images: dict[int, Tensor] = {}
        self._stored: dict[int, Future[StoredObject]] = {}
        self._unstored: deque[Future[StoredObject]] = deque()
        self._result: Future[dict[str, Any]] | None = None
        self._shown: list[Future[StoredObject]] = []
        self._seen: set[tuple[int, int]] = set()
        self._storing = ThreadPoolExecutor(1, "store")
        self._num_drawn = self._num_stored = 0
        """By this attempt."""
        self._keeper = Keeper(run, self._storing)
        self._num_found = num_kept(run)
        self._kept: dict[int, StoredObject] = {}
        """Samples that an earlier attempt has drawn in the same way."""
        self._untaken: deque[Draw[Request]] = deque()
        """Draws of these that are still to be published as its own."""
        self._moving: deque[tuple[Draw[Request], Future[StoredObject | None]]] = deque()
        self.lost: list[Draw[Request]] = []
        """Draws of these that turned out to be gone: to be drawn after all."""
        self.gives_way = False
        """It was asked for the device: nothing more of it is begun, and it leaves when what is in the tile is done."""
        run.phase("sampling")

    @property
    def _held_bytes(self) -> int:
        """Main memory for the most samples that are there at one time: on their way to storage, and for the sheet."""
        num = _num_samples(self.request)
        # Of each in the sheet there are the sample, its place in the stack and the pixels of the sheet.
        return prod(self.model.data.shape) * (min(num, MOST_UNSTORED) + 3 * min(num, MOST_IN_SHEET))

    @property
    def is_exact(self) -> bool:
        return self.request.determinism == "exact"

    @property
    def num_unstored(self) -> int:
        """Samples that are not known to be stored."""
        return len(self._unstored)

    @property
    def is_done(self) -> bool:
        return self._result is not None and self._result.done()

    @property
    def waits_for(self) -> "list[Future[Any]]":
        """What goes on in its thread."""
        futures: list[Future[Any]] = [*self._unstored, *self._shown, *(moved for _, moved in self._moving)]
        return [one for one in (*futures, self._result) if one is not None and not one.done()]

    def left_to_draw(self, width: int) -> list[Draw[Request]]:
        """Its draws but for those that an earlier attempt has done in the same way, in a tile of this width."""
        self._kept = kept(self.run, self._fingerprint(width))
        self._untaken.extend(draw for draw in self.draws if draw.index in self._kept)
        self._steps_behind = sum(self._steps[index] for index in self._kept)
        if self._kept:
            self._width = width
            self.run.log(f"Going on after {len(self._kept)} of {len(self.draws)} samples.")
        return [draw for draw in self.draws if draw.index not in self._kept]

    def take(self, draw: Draw[Request], sample: Tensor | None, width: int) -> None:
        """Store what became of one of its draws in a tile of ``width``.

        Raises:
            NanLoss: it is no number.
        """
        if sample is None:
            raise no_number(draw)
        if self.is_exact and self._width is not None and width < self._width:
            self.run.log(f"Memory ran out: drawing {width} at a time from here on, not {self._width}.")
            self._reproducibility = BY_CHANCE
        self._width = width
        self._steps_behind += self._steps[draw.index] - 1
        self._num_drawn += 1
        if draw.index < MOST_IN_SHEET:
            self._images[draw.index] = sample
        self._stored[draw.index] = self._storing.submit(publish_sample, self.run, self.model, draw, sample)
        self._unstored.append(self._stored[draw.index])

    def show(self, tile: Tile[Any]) -> None:
        """Publish what some samples are going to be, where that was asked for and is due."""
        every = self.request.preview_every if isinstance(self.request, Sampling) else None
        mine = [(draw, steps) for draw, steps in tile.underway if draw.owner is self]
        if every is None or not mine or mine[0][1] == 0 or mine[0][1] % every:
            return
        if any(not one.done() for one in self._shown) or (mine[0][0].index, mine[0][1]) in self._seen:
            return  # storage is behind, or memory ran out and the steps come again
        self._seen.add((mine[0][0].index, mine[0][1]))
        seen = [image for draw, _ in mine[:MOST_SHOWN] if (image := tile.look(draw)) is not None]
        first, steps = mine[0]
        if seen and seen[0].dtype == torch.uint8:
            name = f"preview-{first.index:04d}-{steps:05d}.png"
            picture = encode_png(sheet(torch.stack(seen).numpy()), {"index": first.index, "step": steps})
            about = {"index": first.index, "step": steps}
            publish = partial(self.run.publish, "preview", name, picture, media_type="image/png", metadata=about)
            self._shown.append(self._storing.submit(publish))

    def tell(self, trouble: str | None) -> None:
        """Say once why it is not computed by compiled code, or by what is repeated, where that was asked for."""
        if trouble is None or self._is_told or not (self.request.compiled or self.request.captured):
            return
        self._is_told = True
        if self.request.compiled:
            self.run.log(f"Nothing is compiled, and plain code computes all: {trouble}.")
        else:
            self.run.log(f"Calls are not captured, and launched one kernel after the other: {trouble}.")

    def report(self, underway: Sequence[int]) -> None:
        """Say how far it is; ``underway`` are the steps that each of its draws in the tile has behind it.

        Raises:
            Stopped: on request.
            UploadFailed, StorageUnavailable: a sample could not be stored.
        """
        while self._unstored and self._unstored[0].done():  # one thread stores them, in this order
            self._unstored.popleft().result()
            self._num_stored += 1
        if self._is_drawn:
            self._take_over()
        try:
            self.run.step(self._steps_behind + sum(underway) + self._num_stored, self._num_steps)
            self._leave_if_asked(len(underway))
        except Stopped as stopped:
            if stopped.reason != "cancel" and self._can_be_kept:
                self._keeper.leave(self._list_stored)
            raise
        if self._can_be_kept and self._result is None:
            self._keeper.keep(len(self._kept) + self._num_stored, self._list_stored)

    @property
    def _is_drawn(self) -> bool:
        return len(self._kept) + self._num_drawn == len(self.draws)

    def _take_over(self) -> None:
        """Publish what an earlier attempt has drawn, as much at once as storage keeps up with; then all is there."""
        while self._moving and self._moving[0][1].done():
            draw, moved = self._moving.popleft()
            if (sample := moved.result()) is None:
                del self._kept[draw.index]
                self._steps_behind -= self._steps[draw.index]
                self.lost.append(draw)
            else:
                self._stored[draw.index] = _known(sample)
        while self._untaken and len(self._moving) < MOST_UNSTORED:
            draw = self._untaken.popleft()
            self._moving.append((draw, self._storing.submit(self._move, draw, self._kept[draw.index])))
        if len(self._stored) == len(self.draws) and self._result is None:
            self._result = self._storing.submit(self._finish)

    def _move(self, draw: Draw[Request], sample: StoredObject) -> StoredObject | None:
        """Publish as its own what an earlier attempt has stored; None if that is not there any more."""
        try:
            file = self.run.fetch(sample)
        except LOST:
            return None
        if draw.index < MOST_IN_SHEET:
            self._images[draw.index] = torch.from_numpy(read_sample(file, sample.key))
        return publish_encoded(self.run, self.model, draw, file, is_picture=sample.key.endswith(".png"))

    def _leave_if_asked(self, num_underway: int) -> None:
        """Give the device away where others wait for it: what is in the tile gets done, and nothing more is begun.

        Not before it leaves more behind than it found, so that a job that gives way again and again ends all the same.

        Raises:
            Stopped: on request, once nothing of it is in the tile.
        """
        leaves_more = len(self._kept) + self._num_drawn + num_underway > self._num_found
        if self._is_drawn or not leaves_more or self._reproducibility == BY_CHANCE:
            self.gives_way = False  # what it has could not be kept, or it ends by itself
            return
        try:
            self.run.boundary()
        except Stopped:
            self.gives_way = True
            if not num_underway and not self._unstored:
                raise

    @property
    def _can_be_kept(self) -> bool:
        """Whether all of its samples were drawn in one way."""
        return self._width is not None and self._reproducibility != BY_CHANCE

    def _list_stored(self) -> tuple[dict[str, Any], dict[int, StoredObject]]:
        """For ``Keeper``; called by the thread that stores them, between two."""
        ended = {index: one for index, one in list(self._stored.items()) if one.done() and not one.exception()}
        samples = dict(self._kept) | {index: one.result() for index, one in ended.items()}
        return self._fingerprint(self._width), samples

    def result(self) -> dict[str, Any]:
        """The job's result, once it is done."""
        if self._result is None:
            raise RuntimeError("asked for the result of a job that is still being drawn")
        return self._result.result()

    def close(self) -> None:
        """Store nothing more, and let go of the model."""
        self._storing.shutdown(wait=False, cancel_futures=True)
        self.model.close()

    def _finish(self) -> dict[str, Any]:
        digests = [self._stored[draw.index].result().sha256 for draw in self.draws]
        self.run.phase("uploading")
        images = [self._images[index] for index in sorted(self._images)]
        if images[0].dtype == torch.uint8:
            publish_sheet(self.run, self.model, self.request, images, self.draws)
        return {
            "num_samples": len(self.draws),
            "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
            "reproducibility": self._reproducibility if self.is_exact else BY_CHANCE,
            "fingerprint": self._fingerprint(self._width),
        }

    def _fingerprint(self, width: int | None) -> dict[str, Any]:
        """In what a tile of this width computes."""
        numerics = self.model.numerics
        arithmetic = {"tile": width if self.is_exact else None, "precision": numerics.precision}
        return fingerprint(self.device) | arithmetic | ({"channels_last": True} if numerics.channels_last else {})


def _num_samples(request: Request) -> int:
    """How many are asked for; of inputs there may be fewer."""
    match request:
        case Interpolate():
            return request.num_pairs * request.num_points
        case Traverse():
            return request.num_dimensions * request.num_points
        case _:
            return request.num_samples


def _draws(run: Run, request: Request, data: DataInfo, owner: object) -> list[Draw[Request]]:
    match request:
        case Generate() | Interpolate() | Traverse():
            return [Draw(request=request, index=index, owner=owner) for index in range(_num_samples(request))]
        case _:
            inputs = fetch_task_inputs(run, request, data.shape)
            tensors = [{name: torch.from_numpy(array) for name, array in one.items()} for one in inputs]
            return [Draw(request=request, index=index, inputs=one, owner=owner) for index, one in enumerate(tensors)]


def _known(result: StoredObject) -> Future[StoredObject]:
    future: Future[StoredObject] = Future()
    future.set_result(result)
    return future
