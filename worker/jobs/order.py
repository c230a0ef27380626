"""One ``generate`` job: what it asks for, and what becomes of its samples as they are drawn.

Samples are encoded and stored by a thread of the job's own, in the order they were drawn, so that the network never
waits for storage.
"""

import hashlib
import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import ceil, prod, sqrt
from typing import Any, Final

import numpy as np
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
from worker.jobs.kept import Keeper, kept, read
from worker.jobs.loaded import LoadedModel
from worker.jobs.pictures import Pixels, encode_png, fitted, sheet
from worker.run import Run, Stopped, StoredObject

REQUEST: Final[TypeAdapter[Request]] = TypeAdapter(GenerateSpec)

MAIN_MEMORY: Final = torch.device("cpu")
NPY: Final = "application/x-numpy-data"
"""Media type of an array."""
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
        self._keeper = Keeper(run, self._storing)
        self._kept: deque[tuple[Draw[Request], StoredObject]] = deque()
        """Draws that an earlier attempt has done, and this one has not published yet."""
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
        futures: list[Future[Any]] = [*self._unstored, *self._shown]
        return [one for one in (*futures, self._result) if one is not None and not one.done()]

    def left_to_draw(self, width: int) -> list[Draw[Request]]:
        """Its draws but for those that an earlier attempt has done in the same way, in a tile of this width."""
        done = kept(self.run, self._fingerprint(width))
        self._kept.extend((draw, done[draw.index]) for draw in self.draws if draw.index in done)
        if self._kept:
            self._width = width
            self.run.log(f"Going on after {len(self._kept)} of {len(self.draws)} samples.")
        return [draw for draw in self.draws if draw.index not in done]

    def _take_over(self) -> None:
        """Publish what an earlier attempt has done, as much at once as storage keeps up with.

        Raises:
            Parted: some of it is gone.
        """
        while self._kept and len(self._unstored) < MOST_UNSTORED:
            draw, sample = self._kept.popleft()
            self._accept(draw, torch.from_numpy(np.ascontiguousarray(read(self.run, sample))))

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
        self._accept(draw, sample)

    def _accept(self, draw: Draw[Request], sample: Tensor) -> None:
        self._steps_behind += self._steps[draw.index] - 1
        if draw.index < MOST_IN_SHEET:
            self._images[draw.index] = sample
        self._stored[draw.index] = self._storing.submit(_publish_sample, self.run, self.model, draw, sample)
        self._unstored.append(self._stored[draw.index])
        if len(self._stored) == len(self.draws):
            self._result = self._storing.submit(self._finish)

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

    def report(self, underway: int) -> None:
        """Say how far it is; ``underway`` are the steps that its draws in the tile have behind them.

        Raises:
            Stopped: on request.
            UploadFailed, StorageUnavailable: a sample could not be stored.
            Parted: what an earlier attempt has drawn is gone.
        """
        while self._unstored and self._unstored[0].done():  # one thread stores them, in this order
            self._unstored.popleft().result()
        self._take_over()
        num_stored = len(self._stored) - len(self._unstored)
        try:
            self.run.step(self._steps_behind + underway + num_stored, self._num_steps)
        except Stopped as stopped:
            if stopped.reason != "cancel" and self._can_be_kept:
                self._keeper.leave(self._list_stored)
            raise
        if self._can_be_kept and self._result is None:
            self._keeper.keep(num_stored, self._list_stored)

    @property
    def _can_be_kept(self) -> bool:
        """Whether all of its samples were drawn in one way."""
        return self._width is not None and self._reproducibility != BY_CHANCE

    def _list_stored(self) -> tuple[dict[str, Any], dict[int, StoredObject]]:
        """For ``Keeper``; called by the thread that stores them, between two."""
        ended = {index: one for index, one in list(self._stored.items()) if one.done() and not one.exception()}
        return self._fingerprint(self._width), {index: one.result() for index, one in ended.items()}

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
            _publish_sheet(self.run, self.model, self.request, images, self.draws)
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


def _publish_sample(run: Run, model: LoadedModel, draw: Draw[Request], sample: Tensor) -> StoredObject:
    """Bytes are pixels and go into a PNG with their recipe; other numbers are an array."""
    name, recipe = f"sample-{draw.index:04d}", model.recipe(draw.request) | {"index": draw.index}
    if sample.dtype == torch.uint8:
        picture = encode_png(sample.numpy(), recipe)
        return run.publish("sample", f"{name}.png", picture, media_type="image/png", metadata={"index": draw.index})
    array = io.BytesIO()
    np.save(array, sample.numpy(), allow_pickle=False)
    return run.publish("sample", f"{name}.npy", array.getvalue(), media_type=NPY, metadata=recipe)


def _publish_sheet(
    run: Run, model: LoadedModel, request: Request, images: list[Tensor], draws: list[Draw[Request]]
) -> None:
    samples: Pixels = torch.stack(images).numpy()
    columns = None
    if isinstance(request, Interpolate | Traverse):
        columns = request.num_points
    elif draws[0].inputs is not None:
        # Each input stands left of what became of it.
        shape = samples.shape[1:]
        inputs = np.stack([fitted(draw.inputs["image"].numpy(), shape) for draw in draws[: len(images)] if draw.inputs])
        samples = np.stack([inputs, samples], axis=1).reshape(-1, *samples.shape[1:])
        columns = 2 * ceil(sqrt(len(inputs) / 2))
    picture = encode_png(sheet(samples, columns=columns), model.recipe(request) | {"num_samples": len(draws)})
    run.publish("sheet", "sheet.png", picture, media_type="image/png")
