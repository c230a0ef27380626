"""``worker.app``, with a runner that notes the moments at which it reports (``bench/probed_runner.py``)."""

import sys

import worker.device

worker.device.Device.__init__.__defaults__ = ((sys.executable, "-m", "bench.probed_runner"),)

from worker.app import app  # noqa: E402

# The spawned child does not import the module named on the command line, only these.
app.conf.imports = ("bench.probed_worker", "worker.tasks")

__all__ = ["app"]
