"""Executes ``train`` jobs: fetch, step, report, publish. How a step is done is the engine's affair."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from shared.specs import FAMILIES as SPECS
from shared.specs.tasks import Generate
from shared.specs.training import TrainSpec
from worker.data.dataset import ImageDataset
from worker.engine.checkpoint import Checkpoint, write_weights
from worker.engine.numerics import exact, fingerprint
from worker.engine.order import BatchOrder
from worker.engine.sampling import REPRODUCIBILITY, Tile, sample
from worker.engine.training import Trainer, evaluate
from worker.families import FAMILIES
from worker.families.family import Batch, DataInfo, Draw
from worker.jobs.background import Background
from worker.jobs.inputs import fetch_images, stored
from worker.jobs.pictures import encode_png, sheet
from worker.run import Run, Stopped, StoredObject

MOST_MILESTONES: Final = 50
"""Sample sheets and evaluations of one training, unless the spec says how often."""
MOST_EVALUATED: Final = 2048
"""Samples of each split that an evaluation looks at."""
SHEET_PIXELS: Final = 64 * 32 * 32
"""A preview has 64 samples up to 32 x 32 pixels and fewer larger ones, but at least 16."""

Split = Literal["train", "held_out"]


def train(run: Run) -> dict[str, Any]:
    """Train a model to the end, or from where ``inputs.resume`` left it.

    Raises:
        Stopped: on request; a checkpoint of the step just done was published unless it is canceled.
        DatasetInvalid, ModelLoadFailed, NanLoss: see there; the last also for a damaged checkpoint.
    """
    run.phase("loading_data")
    inputs = run.assignment.inputs
    spec = SPECS[run.assignment.spec["family"]].model_validate(run.assignment.spec)
    dataset = fetch_images(run, inputs["dataset"])
    resume = inputs.get("resume")
    checkpoint = Checkpoint.read(run.fetch(stored(resume))) if resume else None
    # The number of threads orders floating-point sums: a resume uses the one it began with.
    with exact(checkpoint.numerics["num_threads"] if checkpoint else None):
        return _Training(run, spec, dataset, checkpoint).execute()


class _Training:
    """One attempt at one training."""

    def __init__(self, run: Run, spec: TrainSpec, dataset: ImageDataset, checkpoint: Checkpoint | None) -> None:
        self.run, self.spec, self.dataset = run, spec, dataset
        data = DataInfo(shape=dataset.shape, num_classes=dataset.num_classes)
        family, device = FAMILIES[run.assignment.spec["family"]], torch.device(run.device)
        if checkpoint is None:
            self.trainer = Trainer(family, spec, data, device)
        else:
            self.trainer = Trainer.resume(family, spec, data, device, checkpoint)
            run.log(f"Going on from step {checkpoint.step}.")
        self.order = BatchOrder(len(dataset.train_indices), spec.batch_size, spec.seed)
        self.milestone_every = spec.preview_every or milestone_interval(spec.steps, self.order.steps_per_epoch)
        self.previewer = Previewer(self.trainer)
        self.uploads = Background()
        self.checkpointed = self.trainer.step

    def execute(self) -> dict[str, Any]:
        try:
            self.run.phase("training")
            self._loop()
            self.run.phase("evaluating")
            metrics = self._measure()
            self.run.phase("uploading")
            self.uploads.join()
            return self._result(metrics)
        except Stopped as stopped:
            if stopped.reason != "cancel":
                self._leave_checkpoint()
            raise
        finally:
            self.uploads.abandon()

    def _loop(self) -> None:
        trainer, steps = self.trainer, self.spec.steps
        while trainer.step < steps:
            values = trainer.advance(self._batch(self.dataset.train_indices[self.order.at(trainer.step)]))
            self.run.step(trainer.step, steps, **values)
            if trainer.step - self.checkpointed >= self.spec.checkpoint_every and trainer.step < steps:
                self._checkpoint_beside()
            if trainer.step % self.milestone_every == 0 or trainer.step == steps:
                self._publish_preview()
                if trainer.step < steps:
                    self._measure()

    def _batch(self, indices: np.ndarray) -> Batch:
        batch = {"image": torch.from_numpy(self.dataset.gather(indices))}
        if self.dataset.labels is not None:
            batch["label"] = torch.from_numpy(self.dataset.labels[indices])
        return batch

    def _measure(self) -> dict[Split, dict[str, float]]:
        """Evaluate the averaged weights on equally many samples of both splits, and record it."""
        splits: Mapping[Split, np.ndarray] = {
            "train": self.dataset.train_indices,
            "held_out": self.dataset.held_out_indices,
        }
        num_samples = min(MOST_EVALUATED, *(len(indices) or MOST_EVALUATED for indices in splits.values()))
        metrics: dict[Split, dict[str, float]] = {}
        for split, indices in splits.items():
            if len(indices):
                metrics[split] = evaluate(self.trainer, self._batches(indices[:num_samples]))
                self.run.metrics(self.trainer.step, split, metrics[split])
        return metrics

    def _batches(self, indices: np.ndarray) -> Iterator[Batch]:
        size = min(self.spec.batch_size, 256)
        for start in range(0, len(indices), size):
            yield self._batch(indices[start : start + size])
            # Measuring may take long, and a cancel must not wait for it.
            self.run.step(self.trainer.step, self.spec.steps)

    def _publish_preview(self) -> None:
        if (picture := self.previewer.picture()) is not None:
            step = self.trainer.step
            name = f"preview-{step:08d}.png"
            self.run.publish("preview", name, picture, media_type="image/png", metadata={"step": step})

    def _checkpoint_beside(self) -> None:
        # While the last one is still being uploaded training goes on, and the next step asks again.
        if not self.uploads.is_busy:
            checkpoint = self.trainer.checkpoint()
            self.checkpointed = checkpoint.step
            self.uploads.start(partial(publish_checkpoint, self.run, checkpoint))

    def _leave_checkpoint(self) -> None:
        self.uploads.join()
        if self.trainer.step > self.checkpointed:
            publish_checkpoint(self.run, self.trainer.checkpoint())

    def _result(self, metrics: Mapping[Split, Mapping[str, float]]) -> dict[str, Any]:
        trainer = self.trainer
        description = {
            "family": self.run.assignment.spec["family"],
            "spec": self.spec.model_dump(mode="json"),
            "info": trainer.data.as_json(),
            "step": trainer.step,
        }
        weights = publish_weights(self.run, trainer, description)
        return {
            "metrics": metrics,
            "steps": trainer.step,
            "weights": weights.as_json(),
            "info": trainer.data.as_json(),
            "num_parameters": trainer.num_parameters,
            "reproducibility": REPRODUCIBILITY,
            "fingerprint": fingerprint(trainer.device) | trainer.numerics.as_json(),
        }


def milestone_interval(steps: int, steps_per_epoch: int) -> int:
    """Steps between milestones: an epoch, or several where that would make too many."""
    return steps_per_epoch * max(1, ceil(steps / steps_per_epoch / MOST_MILESTONES))


class Previewer:
    """Draws the same latents again and again, so that its sheets show one grid learning."""

    def __init__(self, trainer: Trainer[Any, Any]) -> None:
        self.trainer = trainer
        self._tile: Tile[Generate] | None = None

    def picture(self) -> bytes | None:
        """A PNG sheet of the averaged weights' samples; None for a family that does not generate images."""
        trainer = self.trainer
        if "generate" not in trainer.family.tasks or len(trainer.data.shape) != 3:
            return None
        num_samples = min(64, max(16, SHEET_PIXELS // int(np.prod(trainer.data.shape[1:]))))
        request = Generate(task="generate", model="preview", seed=trainer.spec.seed, num_samples=num_samples)
        draws = [Draw(request=request, index=index) for index in range(num_samples)]
        if self._tile is None:
            sampler = trainer.family.tasks["generate"](trainer.spec, trainer.data)
            self._tile = Tile(trainer.average, sampler, draws[0], trainer.device)
        images = torch.stack([image for _, image in sample(self._tile, draws)])
        return encode_png(sheet(images.numpy()), {"step": trainer.step, "seed": trainer.spec.seed})


def publish_checkpoint(run: Run, checkpoint: Checkpoint) -> None:
    """Upload one file from which ``train`` goes on."""
    with tempfile.TemporaryDirectory(prefix="noisemill-") as folder:
        path = Path(folder) / f"checkpoint-{checkpoint.step:08d}.safetensors"
        checkpoint.write(path)
        metadata = {"step": checkpoint.step}
        run.publish("checkpoint", path.name, path, media_type="application/octet-stream", metadata=metadata)


def publish_weights(run: Run, trainer: Trainer[Any, Any], description: Mapping[str, Any]) -> StoredObject:
    """Upload the averaged weights and the description that is needed to use them."""
    config = json.dumps(description, indent=2, sort_keys=True).encode()
    run.publish("weights", "config.json", config, media_type="application/json")
    with tempfile.TemporaryDirectory(prefix="noisemill-") as folder:
        path = Path(folder) / "model.safetensors"
        write_weights(path, trainer.average, description)
        return run.publish("weights", path.name, path, media_type="application/octet-stream")
