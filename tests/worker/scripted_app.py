"""``worker.app``, with a runner that plays scripts."""

import worker.device
from tests.worker.scripted import SCRIPTED

worker.device.Device.__init__.__defaults__ = (SCRIPTED,)

from worker.app import app  # noqa: E402

# The spawned child does not import the module named on the command line, only these.
app.conf.imports = ("tests.worker.scripted_app", "worker.tasks")

__all__ = ["app"]
