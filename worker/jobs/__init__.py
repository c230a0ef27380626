"""Executors: one module per job type, each a function from a Run to a JSON result, or one that serves several at once.

They are imported when first needed, so that a worker that only ingests never loads torch.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final

from worker.run import Desk, Run

Executor = Callable[[Run], dict[str, Any]]
Server = Callable[[Desk], None]

EXECUTORS: Final[Mapping[str, str]] = {
    "ingest": "worker.jobs.ingest:ingest",
    "train": "worker.jobs.train:train",
    "evaluate": "worker.jobs.evaluate:evaluate",
    "reaverage": "worker.jobs.reaverage:reaverage",
    "export": "worker.jobs.export:export",
    "import": "worker.jobs.imports:import_model",
}
"""Job type to ``module:function``."""
SERVERS: Final[Mapping[str, str]] = {"generate": "worker.jobs.generate:serve"}
"""The same for types whose jobs share the device."""


def executor(job_type: str) -> Executor:
    """The executor of a job type; KeyError for one that has none."""
    return _imported(EXECUTORS[job_type])


def server(job_type: str) -> Server | None:
    """What serves the jobs of this type together; None where each has an executor of its own."""
    return _imported(SERVERS[job_type]) if job_type in SERVERS else None


def _imported(name: str) -> Any:
    module, function = name.split(":")
    return getattr(import_module(module), function)
