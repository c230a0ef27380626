"""The best state that a training has been in, by a held-out figure; its weights, where they are to be registered."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from shared.errors import NanLoss
from shared.specs.training import TrainSpec
from worker.engine.checkpoint import Checkpoint, weights_of
from worker.jobs.batches import Split

Measures = Mapping[Split, Mapping[str, float]]
"""Figures by split."""

PREFIX = "best."
"""Of its weights' names in a checkpoint."""


class Best:
    """What was measured best so far. Part of a checkpoint, so that a resumed training knows it, too."""

    def __init__(self, spec: TrainSpec) -> None:
        self._by = spec.best_by or "loss"
        self._sign = -1 if spec.ranked_by().get(self._by) == "higher" else 1
        self._keeps_weights = spec.weights == "best"
        self._found: Mapping[str, Any] | None = None
        self._weights: Mapping[str, Tensor] = {}

    def score(self, held_out: Mapping[str, float]) -> float | None:
        """The figure as a number of which less is better; None if it was not measured, or is no number."""
        value = held_out.get(self._by)
        return None if value is None else self._sign * value

    def consider(self, step: int, metrics: Measures, net: nn.Module) -> None:
        """Take over what was measured of ``net`` after ``step``, by split, if it is better than all before."""
        score = self.score(metrics.get("held_out", {}))
        if score is None or (self._found is not None and score >= self._found["score"]):
            return
        self._found = {"step": step, "score": score, "metrics": metrics}
        if self._keeps_weights:
            self._weights = weights_of(net)

    def shown(self) -> dict[str, Any] | None:
        """For the result: the figure's name, its value, and the step after which it was measured."""
        if self._found is None:
            return None
        return {"by": self._by, "step": self._found["step"], "value": self._sign * self._found["score"]}

    def taken(self) -> tuple[int, Measures, Mapping[str, Tensor]]:
        """The step, figures and weights to register.

        Raises:
            NanLoss: the figure never was a number.
        """
        if self._found is None:
            raise NanLoss(f"the held-out {self._by} was never a number, so that no state is the best")
        return self._found["step"], self._found["metrics"], self._weights

    def put_into(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint, with what ``restore`` reads."""
        weights = {f"{PREFIX}{name}": tensor for name, tensor in self._weights.items()}
        notes = {**checkpoint.notes, "best": self._found}
        return replace(checkpoint, notes=notes, tensors={**checkpoint.tensors, **weights})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint knows."""
        self._found = checkpoint.notes.get("best")
        named = checkpoint.tensors.items()
        self._weights = {name.removeprefix(PREFIX): one for name, one in named if name.startswith(PREFIX)}
