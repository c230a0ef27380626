"""Executes ``evaluate`` jobs: draw samples, measure them and the model on a dataset, publish the figures."""

import json
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from math import ceil
from typing import Any, Final

import torch
from pydantic_core import PydanticCustomError
from torch import Tensor

from shared.errors import DatasetInvalid
from shared.specs.evaluate import OF_SAMPLES, EvaluateSpec
from shared.specs.tasks import Reconstruct, Request
from worker.data.dataset import ImageDataset
from worker.engine.estimate import require_sample
from worker.engine.numerics import exact, fingerprint
from worker.engine.sampling import BY_CHANCE, REPRODUCIBILITY, LooseTile, Tile, sample
from worker.families.family import Batch, Draw, Score
from worker.jobs.inputs import fetch_images
from worker.jobs.loaded import LoadedModel
from worker.jobs.pictures import encode_png, sheet
from worker.kernels.noise import Domain, Noise
from worker.metrics import sets
from worker.metrics.features import Features, features_of
from worker.metrics.figure import NUM_GROUPS, Estimate, Report, jackknifed, mean_of, share_of
from worker.metrics.images import mean_squared_error, psnr, ssim
from worker.metrics.latents import active_units, codebook_use
from worker.metrics.memorisation import memorisation
from worker.run import Run

SHEET: Final = 64
NUM_PAIRS: Final = 16
"""Closest pairs of sample and training image that are shown."""


def evaluate(run: Run) -> dict[str, Any]:
    """Measure a model version; equal requests of equal weights give equal figures.

    Raises:
        Stopped: on request.
        DatasetInvalid: the dataset has not what was asked for, though nobody has told so when that was submitted.
        ModelLoadFailed: the weights do not fit their description, or the feature network is not there.
        OutOfMemory: not even one sample fits.
    """
    run.phase("loading_model")
    spec = EvaluateSpec.model_validate(dict(run.assignment.spec))
    with exact(), torch.no_grad():
        model = LoadedModel.load(run, run.assignment.inputs["model"], torch.device(run.device), spec.precision)
        with closing(model):
            return _Evaluation(run, spec, model, fetch_images(run, run.assignment.inputs["dataset"])).execute()


class _Evaluation:
    """One attempt at one evaluation."""

    def __init__(self, run: Run, spec: EvaluateSpec, model: LoadedModel, dataset: ImageDataset) -> None:
        self.run, self.spec, self.model, self.dataset = run, spec, model, dataset
        self.device = torch.device(run.device)
        splits = {"train": dataset.train_indices, "held_out": dataset.held_out_indices}
        data = {
            "shape": dataset.shape,
            "num_classes": dataset.num_classes,
            "counts": {name: len(indices) for name, indices in splits.items()},
        }
        info = model.data.as_json()
        try:
            self.wanted = spec.wanted(model.spec, info, data)
        except PydanticCustomError as error:
            raise DatasetInvalid(error.message()) from error
        known = model.spec.scores_on(data, info)
        self.scores = {name: score for name, score in model.family.scores.items() if name in known}
        self.indices = splits.pop(spec.split)
        (self.other_indices,) = splits.values()
        self.features: Features = features_of(spec.features_of(dataset.shape), run.feature_networks)
        self.report, self.tiles, self.by_chance = Report(), dict[str, int](), spec.determinism == "relaxed"
        self.done, self.steps = 0, self._num_steps()

    def _num_steps(self) -> int:
        """Steps of the parts that take long; a few more may come."""
        num = min(self.spec.num_samples, len(self.indices))
        scored = [min(num, score.most or num) for score in self.scores.values()] if "scores" in self.wanted else []
        steps = sum(ceil(each / self.spec.batch_size) for each in scored)
        steps += num if "reconstruction" in self.wanted else 0
        if self.wanted & OF_SAMPLES:
            steps += self.spec.num_samples + (NUM_GROUPS + 1) * len(self.wanted & sets.SET_METRICS.keys())
        return steps

    def execute(self) -> dict[str, Any]:
        self.run.phase("measuring")
        if "scores" in self.wanted:
            self._scores()
        if "reconstruction" in self.wanted:
            self._reconstruction()
        if self.wanted & OF_SAMPLES:
            self._samples()
        self.run.phase("uploading")
        return self._publish()

    def _step(self, num: int = 1) -> None:
        """Say that so much was done, which is also where a stop is noticed."""
        self.done += num
        self.run.step(self.done, max(self.done, self.steps))

    def _evenly(self, indices: Any, most: int) -> Tensor:
        """At most so many images of those at ``indices``, evenly spread over them."""
        num = min(most, len(indices))
        return torch.from_numpy(self.dataset.gather([indices[place * len(indices) // num] for place in range(num)]))

    # The model on data

    def _scores(self) -> None:
        with self._in_fp32() as model:
            for name, score in self.scores.items():
                batches = self._batches(score.most)
                values = torch.cat([self._score(model, score, batch, rows) for rows, batch in batches])
                images = torch.from_numpy(self.dataset.gather(self.indices[: len(values)]))
                self.report.tell(self._estimates(name, score, values), reference=sets.digest(images))

    @contextmanager
    def _in_fp32(self) -> Iterator[LoadedModel]:
        """The model as it is compared with others, in whatever precision its samples are drawn."""
        if self.model.numerics.precision == "fp32":
            yield self.model
            return
        with closing(LoadedModel.load(self.run, self.run.assignment.inputs["model"], self.device)) as model:
            yield model

    def _score(self, model: LoadedModel, score: Score[Any, Any], batch: Batch, rows: range) -> Tensor:
        self._step()
        noise = Noise.of_step(Domain.EVALUATION, self.spec.seed, 0, rows, self.device)
        values = score.values(model.spec, model.net, batch, noise)
        return (values if isinstance(values, Tensor) else self._waited_for(values)).cpu()

    def _waited_for(self, values: Generator[None, None, Tensor]) -> Tensor:
        while True:
            try:
                next(values)
            except StopIteration as done:
                return done.value
            self._step(0)

    def _estimates(self, name: str, score: Score[Any, Any], values: Tensor) -> dict[str, Estimate]:
        """Of all images' values; what is no single number goes into the details."""
        match score.kind:
            case "mean":
                return {name: mean_of(values)}
            case "dimensions":
                self.report.details[name] = values.double().mean(0).tolist()
                return {name: mean_of(values.double().sum(1))}
            case "variation":
                return jackknifed(lambda rows: {name: active_units(values[rows])}, len(values))
            case "codes":
                num_codes = score.num_codes(self.model.spec) if score.num_codes else int(values.max()) + 1
                self.report.details[name] = {"num_codes": num_codes}
                used = jackknifed(lambda rows: vars(codebook_use(values[rows], num_codes)), len(values))
                return {f"{name}_{what}": estimate for what, estimate in used.items()}

    def _batches(self, most: int | None) -> Iterator[tuple[range, Batch]]:
        indices = self.indices[: self.spec.num_samples][:most]
        for start in range(0, len(indices), self.spec.batch_size):
            rows = range(start, min(start + self.spec.batch_size, len(indices)))
            places = indices[rows.start : rows.stop]
            batch = {"image": torch.from_numpy(self.dataset.gather(places)).to(self.device)}
            if self.dataset.labels is not None:
                batch["label"] = torch.from_numpy(self.dataset.labels[places]).to(self.device)
            yield rows, batch

    def _reconstruction(self) -> None:
        images = torch.from_numpy(self.dataset.gather(self.indices[: self.spec.num_samples]))
        request = Reconstruct(task="reconstruct", model=self.spec.model, dataset=self.spec.dataset, seed=self.spec.seed)
        draws = [Draw[Request](request=request, index=i, inputs={"image": one}) for i, one in enumerate(images)]
        made = self._drawn("reconstruct", draws)
        measures = {"reconstruction_mse": mean_squared_error, "psnr": psnr, "ssim": ssim}
        estimates = {name: mean_of(measure(made, images)) for name, measure in measures.items()}
        self.report.tell(estimates, reference=sets.digest(images))

    # Samples

    def _drawn(self, task: str, draws: list[Draw[Request]]) -> Tensor:
        """What became of the draws, by index."""
        images: dict[int, Tensor] = {}
        kind = Tile if self.spec.determinism == "exact" else LooseTile
        sampler = self.model.sampler(task)
        require_sample(self.model.net, sampler, draws[0], self.model.data.shape, self.device)
        tile = kind(self.model.net, sampler, draws[0], self.device)
        width, begun = tile.width, self.done
        steps, stepped = tile.sampler.num_steps(draws[0].request), 0

        def tell(done: int) -> None:
            nonlocal stepped
            stepped = done
            self._step(begun + (stepped + len(images)) // steps - self.done)

        for draw, image in sample(tile, draws, on_step=tell):
            images[draw.index] = image
            tell(stepped)
        self.tiles[task] = tile.width
        self.by_chance |= tile.width < width
        return torch.stack([images[index] for index in range(len(draws))])

    def _samples(self) -> None:
        self.run.phase("sampling")
        draws = [Draw[Request](request=self.spec, index=index) for index in range(self.spec.num_samples)]
        samples = self._drawn("generate", draws)
        recipe = self.model.recipe(self.spec)
        picture = encode_png(sheet(samples[:SHEET].numpy(), columns=8), recipe)
        self.run.publish("sheet", "sheet.png", picture, media_type="image/png")
        self.run.phase("measuring")
        if self.wanted & sets.SET_METRICS.keys():
            self._compare(samples)
        if "memorisation" in self.wanted:
            self._memorisation(samples)
        if "classes" in self.wanted:
            self._classes(samples)

    @cached_property
    def _reference(self) -> Tensor:
        """Images that samples are compared to."""
        return self._evenly(self.indices, self.spec.num_reference)

    @cached_property
    def _reference_digest(self) -> str:
        return sets.digest(self._reference)

    def _compare(self, samples: Tensor) -> None:
        reference, digest = self._reference, self._reference_digest
        described = self._described(reference)
        found = sets.compare(self._described(samples), described, self.wanted, on_evaluation=self._step)
        self.report.tell(found, reference=digest, features=self.features.digest)
        noise = sets.pixel_noise(reference, len(samples))
        real = self._evenly(self.other_indices, len(samples)) if len(self.other_indices) else None
        for name, images in {"real": real, "noise": noise}.items():
            if images is not None and len(images) >= sets.FEWEST:
                self._step()
                self.report.baselines[name] = sets.values(self._described(images), described, self.wanted)
        self.report.details["reference"] = {"digest": digest, "num_images": len(reference)}

    def _described(self, images: Tensor) -> Tensor:
        return self.features.of(images, device=self.device, on_batch=lambda: self._step(0))

    def _memorisation(self, samples: Tensor) -> None:
        train, held_out = (
            torch.from_numpy(self.dataset.gather(indices))
            for indices in (self.dataset.train_indices, self.dataset.held_out_indices)
        )
        found = memorisation(samples, train, held_out, on_batch=self._step)
        estimates = {"nearer_to_train": mean_of(found.nearer_to_train), "copying": mean_of(found.copying)}
        self.report.tell(estimates, reference=sets.digest(train, held_out))
        pairs = found.closest(NUM_PAIRS)
        self.report.details["closest"] = [
            {"sample": i, "image": int(self.dataset.train_indices[j]), "distance": d} for i, j, d in pairs
        ]
        shown = torch.stack([image for i, j, _ in pairs for image in (samples[i], train[j])])
        picture = encode_png(sheet(shown.numpy(), columns=8), {"pairs": self.report.details["closest"]})
        self.run.publish("sheet", "closest.png", picture, media_type="image/png")

    def _classes(self, samples: Tensor) -> None:
        self._step()
        classes = self.features.classes(samples, device=self.device)
        shares = classes.bincount(minlength=self.features.num_classes) / len(classes)
        self.report.details["class_shares"] = shares.tolist()
        if (asked := self._asked_classes()) is not None:
            estimates = {"class_accuracy": share_of(classes == asked)}
            self.report.tell(estimates, reference=self._reference_digest, features=self.features.digest)

    def _asked_classes(self) -> Tensor | None:
        """The class of each sample that was asked for; None of a model that knows none."""
        num_classes = self.model.spec.num_classes(self.model.data.as_json())
        if not num_classes:
            return None
        labels = torch.tensor(self.spec.labels or range(num_classes))
        return labels[torch.arange(self.spec.num_samples) % len(labels)]

    def _publish(self) -> dict[str, Any]:
        result = {
            "figures": {name: figure.as_json() for name, figure in self.report.figures.items()},
            "baselines": self.report.baselines,
            "details": self.report.details,
            "features": {"name": self.features.name, "digest": self.features.digest},
            "model": self.model.name,
            "weights_sha256": self.model.sha256,
            "dataset": self.spec.dataset,
            "split": self.spec.split,
        }
        body = json.dumps(result, indent=2, sort_keys=True, allow_nan=False).encode()
        report = self.run.publish("report", "evaluation.json", body, media_type="application/json")
        return result | {
            "sha256": report.sha256,
            "reproducibility": BY_CHANCE if self.by_chance else REPRODUCIBILITY,
            "fingerprint": fingerprint(self.device) | {"tiles": self.tiles, "precision": self.model.numerics.precision},
        }
