"""A model version on the device: its network, kept warm between jobs, and what it needs to be asked something."""

import json
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn

from shared.specs.tasks import OPTIONS, Precision, Request
from shared.specs.training import TrainSpec
from worker.engine.checkpoint import load_weights, undrawn
from worker.engine.estimate import require
from worker.engine.models import MODELS
from worker.engine.numerics import Numerics, for_sampling
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.jobs.inputs import stored
from worker.run import Run


class LoadedModel:
    """A model version on the device, which keeps it until ``close``."""

    def __init__(self, fields: Mapping[str, Any], spec: TrainSpec, data: DataInfo, numerics: Numerics) -> None:
        self.name = f"{fields['name']}@{fields['version']}"
        self.sha256: str = fields["weights"]["sha256"]
        self.family = FAMILIES[fields["family"]]
        self.spec, self.data, self.numerics = spec, data, numerics
        self.net: nn.Module
        self._key: Hashable

    @staticmethod
    def is_loaded(fields: Mapping[str, Any], device: torch.device) -> bool:
        """Whether a network of its weights is on the device, in one precision or another."""
        return (fields["weights"]["sha256"], str(device)) in {key[:2] for key in MODELS.keys}

    @staticmethod
    def require_memory(fields: Mapping[str, Any], device: torch.device) -> None:
        """Raise OutOfMemory unless there is room for its weights."""
        require(fields["weights"]["size_bytes"], device, f"the model {fields['name']}@{fields['version']}")

    @classmethod
    def load(
        cls,
        run: Run,
        fields: Mapping[str, Any],
        device: torch.device,
        precision: Precision = "fp32",
        *,
        is_compiled: bool = False,
    ) -> "LoadedModel":
        """Load it unless it is there. What is compiled is a network of its own: others are to have their bytes.

        Raises:
            ModelLoadFailed: the weights do not fit their description.
            OutOfMemory: they do not fit into memory.
        """
        family = FAMILIES[fields["family"]]
        spec = family.spec.model_validate(fields["spec"])
        data = DataInfo.from_json(fields["info"])
        numerics = Numerics.of_sampling(spec, precision, device)
        model = cls(fields, spec, data, numerics)

        def load() -> nn.Module:
            cls.require_memory(fields, device)
            with undrawn():
                net = build(family, spec, data)
            load_weights(run.fetch(stored(fields["weights"])), net)
            return for_sampling(net.to(device), numerics)

        # The same weights may be described in another way, which makes another network of them.
        described = spec.model_dump_json(), json.dumps(data.as_json()), numerics, is_compiled
        model._key = fields["weights"]["sha256"], str(device), *described
        run.found_model(was_loaded=model._key in MODELS)
        model.net = MODELS.take(model._key, load)
        return model

    def close(self) -> None:
        """Say that it is needed no longer."""
        MODELS.give_back(self._key)

    def sampler(self, task: str) -> Any:
        return self.family.tasks[task](self.spec, self.data)

    def recipe(self, request: Request) -> dict[str, Any]:
        """What the bytes of a sample depend on, and how to ask for it again; nothing of the job."""
        meaningless = OPTIONS - self.spec.tasks[request.task]
        how_many = {"num_samples", "num_pairs"}
        how = {"precision", "determinism", "compiled", "captured", "preview_every"}
        elsewhere = {"model", "task", "seed"} | how_many | how
        parameters = request.model_dump(mode="json", exclude=elsewhere | meaningless)
        return {
            "model": self.name,
            "weights_sha256": self.sha256,
            "task": request.task,
            "parameters": parameters,
            "seed": request.seed,
        } | ({} if self.numerics.precision == "fp32" else {"precision": self.numerics.precision})
