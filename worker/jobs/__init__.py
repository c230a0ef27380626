"""Executors: one module per job type, each a function from a Run to a JSON result.

They are imported when first needed, so that a worker that only ingests never loads torch.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final

from worker.run import Run

Executor = Callable[[Run], dict[str, Any]]

EXECUTORS: Final[Mapping[str, str]] = {
    "ingest": "worker.jobs.ingest:ingest",
    "train": "worker.jobs.train:train",
    "generate": "worker.jobs.generate:generate",
    "evaluate": "worker.jobs.evaluate:evaluate",
    "reaverage": "worker.jobs.reaverage:reaverage",
}
"""Job type to ``module:function``."""


def executor(job_type: str) -> Executor:
    """The executor of a job type; KeyError for one that has none."""
    module, function = EXECUTORS[job_type].split(":")
    return getattr(import_module(module), function)
