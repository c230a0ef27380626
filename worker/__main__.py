"""``python -m worker -Q train,ingest -n worker@%h``: starts a worker. Options are those of ``celery worker``, but
``--detach``.

Opens the nursery before all else: importing torch takes longer than all that Celery and the supervisor import, and goes
on beside it.
"""

import os
import sys
from importlib import import_module
from typing import Any, cast

from worker.nursery import Nursery


def _refuse_to_detach(context: Any, _option: Any, value: Any) -> Any:
    """Celery would start ``celery worker`` in its place, without the nursery, which ends with this process."""
    if value:
        context.fail("--detach: a Noisemill worker stays in the foreground; have a service manager keep it")
    return value


def main(app: str = "worker.app") -> None:
    """``app``: the module whose ``app`` is Celery's."""
    nursery = Nursery()
    os.environ["NOISEMILL_WORKER_NURSERY"] = str(nursery.address)
    # Celery then gives its job back within a bound instead of running it to its end; it reads this when it is imported.
    os.environ.setdefault("REMAP_SIGTERM", "SIGQUIT")
    from celery.bin.base import CLIContext
    from celery.bin.worker import worker

    # Not by ``celery.bin.celery``, which imports all other commands, Flower's among them.
    context = CLIContext(app=import_module(app).app, no_color=None, workdir=None)
    for option in cast("list[Any]", worker.params):
        if option.name == "detach":
            option.callback, option.hidden = _refuse_to_detach, True
    try:
        worker.main(sys.argv[1:], prog_name="python -m worker", obj=context, auto_envvar_prefix="CELERY_WORKER")
    finally:
        nursery.close()


if __name__ == "__main__":
    main()
