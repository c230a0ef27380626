"""Executes ``generate`` jobs, whatever the task: load the model, draw, publish each sample and a sheet."""

import hashlib
import io
import json
from collections.abc import Mapping
from math import ceil, sqrt
from typing import Any, Final

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from shared.specs import GenerateSpec
from shared.specs.tasks import OPTIONS, Generate, Interpolate, Request, Traverse
from shared.specs.training import TrainSpec
from worker.engine.checkpoint import load_weights
from worker.engine.models import MODELS
from worker.engine.numerics import exact, fingerprint
from worker.engine.sampling import BY_CHANCE, REPRODUCIBILITY, Reproducibility, Tile, sample
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo, Draw
from worker.jobs.inputs import fetch_task_inputs, stored
from worker.jobs.pictures import Pixels, encode_png, fitted, sheet
from worker.run import Run, StoredObject

REQUEST: Final[TypeAdapter[Request]] = TypeAdapter(GenerateSpec)

NPY: Final = "application/x-numpy-data"
"""Media type of an array."""
MOST_IN_SHEET: Final = 256
"""Samples beyond these are published alone."""


def generate(run: Run) -> dict[str, Any]:
    """Draw the samples that ``spec`` asks for; equal requests to equal weights give equal bytes.

    Where memory runs out it goes on with a narrower tile. That is another tile, and other last bits: the fingerprint
    names it, unless some samples were drawn with the wider one.

    Raises:
        Stopped: on request.
        ModelLoadFailed: the weights do not fit their description.
        OutOfMemory: not even one sample fits.
    """
    run.phase("loading_model")
    request = REQUEST.validate_python(dict(run.assignment.spec))
    device = torch.device(run.device)
    with exact():
        model = LoadedModel.load(run, run.assignment.inputs["model"], device)
        draws = _draws(run, request, model.data)
        tile = Tile(model.net, model.sampler(request.task), draws[0], device)
        run.phase("sampling")
        images, digests, reproducibility = _publish_samples(run, model, tile, draws)
        run.phase("uploading")
        if images[0].dtype == torch.uint8:
            _publish_sheet(run, model, request, images, draws)
        return {
            "num_samples": len(draws),
            "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
            "reproducibility": reproducibility,
            "fingerprint": fingerprint(device) | {"tile": tile.width, "precision": "fp32"},
        }


class LoadedModel:
    """A model version on the device."""

    def __init__(self, fields: Mapping[str, Any], net: nn.Module, spec: TrainSpec, data: DataInfo) -> None:
        self.name = f"{fields['name']}@{fields['version']}"
        self.sha256: str = fields["weights"]["sha256"]
        self.family = FAMILIES[fields["family"]]
        self.net, self.spec, self.data = net, spec, data

    @classmethod
    def load(cls, run: Run, fields: Mapping[str, Any], device: torch.device) -> "LoadedModel":
        family = FAMILIES[fields["family"]]
        spec = family.spec.model_validate(fields["spec"])
        data = DataInfo.from_json(fields["info"])

        def load() -> nn.Module:
            net = build(family, spec, data)
            load_weights(run.fetch(stored(fields["weights"])), net)
            return net.requires_grad_(requires_grad=False).eval().to(device)

        # The same weights may be described in another way, which makes another network of them.
        key = (fields["weights"]["sha256"], spec.model_dump_json(), json.dumps(data.as_json()), str(device))
        return cls(fields, MODELS.get(key, load), spec, data)

    def sampler(self, task: str) -> Any:
        return self.family.tasks[task](self.spec, self.data)

    def recipe(self, request: Request) -> dict[str, Any]:
        """What the bytes of a sample depend on, and how to ask for it again; nothing of the job."""
        meaningless = OPTIONS - self.spec.tasks[request.task]
        elsewhere = {"model", "task", "seed", "num_samples", "num_pairs"}
        parameters = request.model_dump(mode="json", exclude=elsewhere | meaningless)
        return {
            "model": self.name,
            "weights_sha256": self.sha256,
            "task": request.task,
            "parameters": parameters,
            "seed": request.seed,
        }


def _draws(run: Run, request: Request, data: DataInfo) -> list[Draw[Request]]:
    match request:
        case Generate():
            return [Draw(request=request, index=index) for index in range(request.num_samples)]
        case Interpolate() | Traverse():
            num_rows = request.num_pairs if isinstance(request, Interpolate) else request.num_dimensions
            num_samples = num_rows * request.num_points
            return [Draw(request=request, index=index) for index in range(num_samples)]
        case _:
            inputs = fetch_task_inputs(run, request, data.shape)
            tensors = [{name: torch.from_numpy(array) for name, array in one.items()} for one in inputs]
            return [Draw(request=request, index=index, inputs=one) for index, one in enumerate(tensors)]


def _publish_samples(
    run: Run, model: LoadedModel, tile: Tile[Request], draws: list[Draw[Request]]
) -> tuple[list[Tensor], list[str], Reproducibility]:
    """Publish each sample as soon as it is done; returns the first ones and all digests, by index."""
    images: dict[int, Tensor] = {}
    digests: dict[int, str] = {}
    width, reproducibility = tile.width, REPRODUCIBILITY
    steps, stepped = sum(tile.sampler.num_steps(draw.request) for draw in draws), 0

    def tell(done: int) -> None:
        # With each step, as one sample of many may take longer than a job is believed to be alive.
        nonlocal stepped
        stepped = done
        run.step(stepped + len(digests), steps)

    for draw, image in sample(tile, draws, on_step=tell):
        if tile.width < width:
            run.log(f"Memory ran out: drawing {tile.width} at a time from here on, not {width}.")
            width, reproducibility = tile.width, BY_CHANCE if digests else reproducibility
        digests[draw.index] = _publish_sample(run, model, draw, image).sha256
        if draw.index < MOST_IN_SHEET:
            images[draw.index] = image
        tell(stepped)
    in_order = [images[index] for index in sorted(images)], [digests[index] for index in sorted(digests)]
    return *in_order, reproducibility


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
