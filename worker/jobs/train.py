"""Executes ``train`` jobs: fetch, step, report, publish. How a step is done is the engine's affair."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil, isfinite
from typing import Any, Final

import torch

from shared.errors import DatasetInvalid, NanLoss
from shared.specs import FAMILIES as SPECS
from shared.specs.training import FEWEST_HELD_OUT, NEARNESS, TrainSpec
from worker.data.dataset import open_images
from worker.engine.checkpoint import Checkpoint, weights_of
from worker.engine.estimate import require, training_bytes
from worker.engine.evaluation import evaluate
from worker.engine.models import MODELS
from worker.engine.numerics import Numerics, exact, fingerprint
from worker.engine.sampling import BY_CHANCE, REPRODUCIBILITY
from worker.engine.team import Team
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import Batch, DataInfo, Origin
from worker.jobs.batches import Ahead, Batches, Split
from worker.jobs.best import Best, Measures
from worker.jobs.checkpoints import Checkpoints
from worker.jobs.crew import crew, order, versions
from worker.jobs.inputs import fetch_files, stored
from worker.jobs.nearness import BATCH_SIZE, MOST_COMPARED, NUM_DRAWN, Nearness
from worker.jobs.previews import Previewer
from worker.jobs.switching import Switch
from worker.jobs.weights import publish_averages, publish_weights
from worker.metrics.networks import fill_from, find_network
from worker.run import Run, Stopped

MOST_MILESTONES: Final = 50
"""Sample sheets and evaluations of one training, unless the spec says how often."""
MOST_EVALUATED: Final = 2048
"""Samples of each split that an evaluation looks at."""


def train(run: Run) -> dict[str, Any]:
    """Train a model to the end, or from where the best intact one of ``inputs.resume`` left it.

    A loss that is no number sends the training back to its last checkpoint, once: it computes the same again, so
    that a fault of the hardware passes and nothing else does.

    Raises:
        Stopped: on request; a checkpoint of the step just done was published unless it is canceled.
        DatasetInvalid, NanLoss, OutOfMemory: see there.
    """
    run.phase("loading_data")
    spec = SPECS[run.assignment.spec["family"]].model_validate(run.assignment.spec)
    further = {field: run.assignment.inputs["further_datasets"][field] for field in spec.further_datasets}
    datasets = {"image": run.assignment.inputs["dataset"], **further}
    files = {name: fetch_files(run, one) for name, one in datasets.items()}
    batches = Batches({name: open_images(paths) for name, paths in files.items()}, spec)
    # A training has the device for itself: what fits must not depend on what was sampled before.
    MODELS.drop_unused()
    devices = devices_for(run, spec)
    num_others = spec.most_processes - len(devices)
    wanted = {"datasets": {name: {"files": one["files"]} for name, one in datasets.items()}}
    kind = torch.device(run.device).type
    with (
        exact(),
        run.gathering.asked(num_others, kind, wanted, versions(), still=run.boundary) as members,
        crew(devices, spec.model_dump(mode="json"), files, members=members, host=run.gathering.host) as team,
        closing(Ahead(batches, team, torch.device(run.device))) as ahead,
        closing(Switch(run, spec, team.size)) as switch,
    ):
        if members:
            run.log(f"Training with {team.size} processes, on {len(members) + 1} hosts.")
        return _Training(run, spec, ahead, team, switch).execute()


def devices_for(run: Run, spec: TrainSpec) -> Sequence[str]:
    """Those of the worker that can share the training."""
    devices = run.devices[: spec.most_processes]
    if len(devices) < len(run.devices):
        run.log(f"Batches of this training can be shared by {len(devices)} of the worker's {len(run.devices)} devices.")
    return devices


@dataclass(kw_only=True)
class Notes:
    """What a training remembers in its checkpoints beside its arithmetic."""

    measured: int = 0
    """The last step whose figures were recorded."""
    previewed: int = 0
    """The last step that was shown."""
    score: float | None = None
    """The held-out figure by which checkpoints are compared when it was last measured; less is better."""
    rollbacks: int = 0
    """How often the training went back because its loss was no number."""
    feature_networks: dict[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of the files of the feature networks that are a part of the model, by part."""
    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """How the network's repeated blocks are called, where they are to be compiled."""


class _Training:
    """One attempt at one training."""

    def __init__(self, run: Run, spec: TrainSpec, ahead: Ahead, team: Team, switch: Switch) -> None:
        self.run, self.spec, self.ahead, self.team, self.switch = run, spec, ahead, team, switch
        self.batches = batches = ahead.batches
        self.models: Mapping[str, Mapping[str, Any]] = run.assignment.inputs.get("models", {})
        origins = {field: Origin.from_json(model) for field, model in self.models.items()}
        self.data = DataInfo(shape=batches.shape, num_classes=batches.num_classes, models=origins)
        self.family, self.device = FAMILIES[run.assignment.spec["family"]], torch.device(run.device)
        self.milestone_every = spec.preview_every or milestone_interval(spec.steps, batches.steps_per_epoch)
        if spec.weights == "best" and "held_out" not in batches.measured(1):
            raise DatasetInvalid("the dataset has no held-out samples, which say what is best")
        self.checkpoints = Checkpoints(run, keep=spec.keep_checkpoints)
        self.best, self.nearness = Best(spec), self._nearness()
        self.told: str | None = None
        """Why steps are not captured."""
        self.notes = self._begin()
        if self.trainer.step:
            run.log(f"Going on from step {self.trainer.step}.")

    def _nearness(self) -> Nearness | None:
        """What measures samples, where that says which state is the best."""
        metric = self.spec.best_by
        if metric is None or metric not in NEARNESS:
            return None
        found = self.batches.num_of("held_out")
        if found < FEWEST_HELD_OUT:
            raise DatasetInvalid(f"{metric} needs {FEWEST_HELD_OUT} held-out images, and the dataset has {found}")
        num = min(found, MOST_COMPARED)
        held_out = partial(self.batches.of, "held_out", num, BATCH_SIZE)
        return Nearness(metric, (num, *self.batches.shape), lambda: (batch["image"] for batch in held_out()))

    def _begin(self) -> Notes:
        """Begin at the best checkpoint, or afresh; returns what was noted there."""
        resumed = self.checkpoints.restore(self._resumed)
        self.trainer, notes = resumed or self._afresh()
        self.switch.resume(self.trainer, notes.calls)
        order(self.team, "join", data=self.data.as_json())
        self.trainer.share()
        self.previewer = Previewer(self.trainer)
        self.checkpointed = self.trainer.step
        return notes

    def _afresh(self) -> tuple[Trainer[Any, Any], Notes]:
        self._require_memory()
        trainer = Trainer(self.family, self.spec, self.data, self.device, team=self.team)
        for named_by, model in self.models.items():
            if named_by == "init_from" or named_by in self.spec.built_on:
                trainer.begin_with(named_by, self.run.fetch(stored(model["weights"])))
        return trainer, Notes(feature_networks=self._see_with(trainer))

    def _require_memory(self) -> None:
        num_bytes = training_bytes(self.family, self.spec, self.data)
        require(num_bytes, self.device, "a training with its weights, their average, gradients and moments")

    def _see_with(self, trainer: Trainer[Any, Any]) -> dict[str, str]:
        """Give the network its feature networks, unless it has those of the model that it begins with; their digests.

        A resumed training has them in its checkpoint, and so asks nothing of its worker's folder.
        """
        if "init_from" in self.models:
            return self.models["init_from"]["info"].get("feature_networks", {})
        digests: dict[str, str] = {}
        for part, name in self.spec.feature_networks().items():
            path, digests[part] = find_network(name, self.run.feature_networks)
            fill_from(path, *(net.get_submodule(part) for net in (trainer.net, trainer.average)))
        return digests

    def _resumed(self, checkpoint: Checkpoint) -> tuple[Trainer[Any, Any], Notes]:
        trainer = Trainer.resume(self.family, self.spec, self.data, self.device, checkpoint, self.team)
        # It orders floating-point sums: a resume uses the number that the training began with.
        torch.set_num_threads(trainer.numerics.num_threads)
        self.best.restore(checkpoint)
        return trainer, Notes(**{name: note for name, note in checkpoint.notes.items() if name != "best"})

    def execute(self) -> dict[str, Any]:
        try:
            self.run.phase("training")
            self._loop()
            self.run.phase("evaluating")
            metrics = self._measure()
            self.run.phase("uploading")
            self.checkpoints.join()
            return self._result(metrics)
        except Stopped as stopped:
            # On the way back to a checkpoint there is no training, and that checkpoint is the last.
            if stopped.reason != "cancel" and hasattr(self, "trainer"):
                self.checkpoints.leave(self._checkpoint, self.trainer.step)
            raise
        finally:
            self.checkpoints.abandon()

    def _loop(self) -> None:
        self._milestone()  # that the attempt before was stopped in
        self._switch_if_due()
        while self.trainer.step < self.spec.steps:
            if values := self._advance():
                self.run.step(self.trainer.step, self.spec.steps, **values)
                self._milestone()
                self._switch_if_due()
                self._checkpoint_if_due()

    def _advance(self) -> dict[str, float] | None:
        """Do one step and return its figures; None if the training went back instead."""
        batch = self.ahead.at(self.trainer.step)
        before = self.trainer.numerics
        order(self.team, "step")
        try:
            with self.switch.observed(self.trainer):
                values = self.trainer.advance(batch)
        except NanLoss as error:
            trouble = str(error)
        else:
            self._tell_of_memory(before)
            self._tell_of_repeats()
            self.notes.calls = [call.as_json() for call in self.switch.calls]
            return values
        # Not in the handler: the error holds the frames of the broken training, and they its memory.
        self._go_back(trouble)
        return None

    def _tell_of_memory(self, before: Numerics) -> None:
        num, step, now = self.trainer.micro_batch, self.trainer.step, self.trainer.numerics
        if now.halved_at != before.halved_at:
            self.run.log(f"Memory ran out at step {step}: going on with {num} samples at a time, to the same sum.")
        elif now.micro_batch != before.micro_batch:
            self.run.log(f"{num} samples at a time fit into memory.")

    def _tell_of_repeats(self) -> None:
        repeats = self.trainer.captured.repeats
        if repeats.trouble is not None and repeats.trouble != self.told:
            self.told = repeats.trouble
            self.run.log(f"Steps are not captured, and launched one kernel after the other: {self.told}.")

    def _go_back(self, trouble: str) -> None:
        if self.notes.rollbacks:
            raise NanLoss(f"{trouble}, after the training had gone back to a checkpoint once")
        self.checkpoints.join()
        del self.trainer, self.previewer
        # What was recorded of the steps that come again stays recorded, and with it what was best of them.
        best = copy(self.best)
        self.notes = replace(self.notes, score=self._begin().score, rollbacks=1)
        self.best = best
        self.run.log(f"{trouble}: going back to step {self.trainer.step}, this once.")
        # Waited for, so that it stays at this once whatever happens to the attempt.
        self.checkpoints.begin(self._checkpoint())
        self.checkpoints.join()

    def _milestone(self) -> None:
        """Show and measure the training where that is due and was not done."""
        step, steps = self.trainer.step, self.spec.steps
        if step == 0 or (step % self.milestone_every and step < steps):
            return
        if self.notes.previewed < step:
            self._publish_preview()
            self.notes.previewed = step
        if self.notes.measured < step < steps:
            self._measure()

    def _switch_if_due(self) -> None:
        is_last = self.trainer.step == self.spec.steps
        if not is_last and self.switch.is_made(self.trainer) and self.spec.compiled_from == "auto":
            # Waited for: an attempt after this one, which cannot know when it would be due, switches at the same step.
            self._store()
            self.checkpoints.join()

    def _checkpoint_if_due(self) -> None:
        step = self.trainer.step
        if step - self.checkpointed < self.spec.checkpoint_every or step == self.spec.steps:
            return
        self.run.boundary()
        # While the last one is still being stored training goes on, and the next step asks again.
        if not self.checkpoints.is_busy:
            self._store()

    def _store(self) -> None:
        self.checkpoints.begin(self._checkpoint())
        self.checkpointed = self.trainer.step

    def _checkpoint(self) -> Checkpoint:
        return self.best.put_into(self.trainer.checkpoint(asdict(self.notes)))

    def _measure(self) -> dict[Split, dict[str, float]]:
        """Evaluate the averaged weights on equally many samples of both splits, and by what they draw where ``best_by``
        asks for it, and record it."""
        metrics: dict[Split, dict[str, float]] = {}
        for split in (measured := self.batches.measured(MOST_EVALUATED)):
            figures = evaluate(self.trainer, self._batches(split, measured[split]))
            metrics[split] = {name: value for name, value in figures.items() if isfinite(value)}
        if self.nearness is not None:
            metrics["held_out"] |= self._measure_samples(self.nearness)
        # Together, so that a stop in between does not leave one of them to be recorded twice.
        for split, figures in metrics.items():
            self.run.metrics(self.trainer.step, split, figures)
        self.notes.measured = self.trainer.step
        self.notes.score = self.best.score(metrics.get("held_out", {}))
        self.best.consider(self.trainer.step, metrics, self.trainer.average)
        return metrics

    def _measure_samples(self, nearness: Nearness) -> dict[str, float]:
        """What says which state is the best; nothing where that cannot be told of this one."""
        try:
            samples = self.previewer.drawn(NUM_DRAWN, self._still_here)
            return {} if samples is None else nearness.of(samples, self._still_here)
        except NanLoss as error:
            self.run.log(f"What it draws after step {self.trainer.step} was not measured: {error}.")
            return {}

    def _batches(self, split: Split, num_samples: int) -> Iterator[Batch]:
        for batch in self.batches.of(split, num_samples, min(self.trainer.micro_batch, 256)):
            yield batch
            self._still_here()

    def _still_here(self, _done: int = 0) -> None:
        """Measuring and drawing may take long, and a cancel must not wait for it."""
        self.run.step(self.trainer.step, self.spec.steps)

    def _publish_preview(self) -> None:
        step, picture = self.trainer.step, None
        try:
            picture = self.previewer.picture(self._still_here)
        except NanLoss as error:
            self.run.log(f"There is no sheet of samples after step {step}: {error}.")
        if picture is not None:
            name = f"preview-{step:08d}.png"
            self.run.publish("preview", name, picture, media_type="image/png", metadata={"step": step})

    def _result(self, metrics: Measures) -> dict[str, Any]:
        trainer, weights, step = self.trainer, weights_of(self.trainer.average), self.trainer.step
        if self.spec.weights == "best":
            step, metrics, weights = self.best.taken()
        seen_with = {"feature_networks": self.notes.feature_networks} if self.notes.feature_networks else {}
        info = trainer.data.as_json() | seen_with
        description = {
            "family": self.run.assignment.spec["family"],
            "spec": self.spec.model_dump(mode="json"),
            "info": info,
            "step": step,
        }
        published = publish_weights(self.run, weights, description)
        if trainer.averages is not None:
            publish_averages(self.run, trainer, trainer.averages, description | {"step": trainer.step})
        return {
            "metrics": metrics,
            "best": self._best(),
            "steps": trainer.step,
            "weights": published.as_json(),
            "info": info,
            "num_parameters": trainer.num_parameters,
            "reproducibility": REPRODUCIBILITY if trainer.numerics.is_repeatable(self.spec) else BY_CHANCE,
            "fingerprint": fingerprint(trainer.device) | trainer.numerics.as_json() | seen_with,
        }

    def _best(self) -> dict[str, Any] | None:
        """The best state, and what a figure of samples was measured with."""
        shown, nearness = self.best.shown(), self.nearness
        return shown if shown is None or nearness is None else shown | nearness.told()


def milestone_interval(steps: int, steps_per_epoch: int) -> int:
    """Steps between milestones: an epoch, or several where that would make too many."""
    return steps_per_epoch * max(1, ceil(steps / steps_per_epoch / MOST_MILESTONES))
