"""``worker``, with a runner that plays scripts, and a start that dwells where ``DWELL_IN`` says.

``DWELL_IN``: names of what the pool's child calls while it starts, each of which then takes ``DWELL`` seconds more.
``DWELL_BEFORE_TASKS``: seconds for which the child has started and does not look at what its parent has for it.
"""

import os
import time
from typing import Any

import worker.nursery
from tests.worker.scripted import SCRIPTED
from worker.__main__ import main

worker.nursery.COMMAND = SCRIPTED


def _dwelling(act: Any) -> Any:
    def dwelling(*arguments: Any, **named: Any) -> Any:
        time.sleep(float(os.environ["DWELL"]))
        return act(*arguments, **named)

    return dwelling


def _dwell_before_tasks(**_: Any) -> None:
    time.sleep(float(os.environ.get("DWELL_BEFORE_TASKS", "0")))


if __name__ == "__main__":
    main("tests.worker.scripted_app")
elif __name__ != "__mp_main__":  # under that name Celery's pool imports it once more
    from celery import signals

    from worker import lifecycle
    from worker.app import app

    # The spawned child does not import the module named on the command line, only these.
    app.conf.imports = ("tests.worker.scripted_app", "worker.tasks")
    for _name in os.environ.get("DWELL_IN", "").split():
        setattr(lifecycle, _name, _dwelling(getattr(lifecycle, _name)))
    signals.worker_process_init.connect(_dwell_before_tasks)

    __all__ = ["app"]
