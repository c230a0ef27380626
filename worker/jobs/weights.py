"""A model's weights as artifacts: what a generate job reads, and what says how to build their network."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shared.specs.reaverage import AVERAGES
from worker.engine.averages import PowerAverages
from worker.engine.checkpoint import write_tensors
from worker.engine.training import Trainer
from worker.run import Run, StoredObject

BYTES = "application/octet-stream"


def publish_weights(run: Run, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> StoredObject:
    """Upload weights and the description that is needed to use them."""
    config = json.dumps(description, indent=2, sort_keys=True).encode()
    run.publish("weights", "config.json", config, media_type="application/json")
    with tempfile.TemporaryDirectory(prefix="noisemill-") as folder:
        path = Path(folder) / "model.safetensors"
        write_tensors(path, weights, description)
        return run.publish("weights", path.name, path, media_type=BYTES)


def publish_averages(run: Run, trainer: Trainer[Any, Any], averages: PowerAverages, description: Any) -> None:
    """Upload what averages of other lengths are made of."""
    with tempfile.TemporaryDirectory(prefix="noisemill-") as folder:
        path = Path(folder) / AVERAGES
        averages.write(path, trainer.average, description)
        run.publish("weights", path.name, path, media_type=BYTES)
