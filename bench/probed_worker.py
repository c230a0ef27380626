"""``worker``, with a runner that notes the moments at which it reports (``bench/probed_runner.py``)."""

import sys

import worker.nursery
from worker.__main__ import main

worker.nursery.COMMAND = (sys.executable, "-m", "bench.probed_runner")

if __name__ == "__main__":
    main("bench.probed_worker")
elif __name__ != "__mp_main__":  # under that name Celery's pool imports it once more
    from worker.app import app

    # The spawned child does not import the module named on the command line, only these.
    app.conf.imports = ("bench.probed_worker", "worker.tasks")
    __all__ = ["app"]
