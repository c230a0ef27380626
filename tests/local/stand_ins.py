"""Small processes in the place of Noisemill's own, and the command line that runs a stack of them.

python -m tests.local.stand_ins FOLDER SERVICES
"""

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from noisemill.local import Stack
from noisemill.local.probe import http_get
from noisemill.local.services import Command, Services, Wiring


def serving(port: int) -> list[str]:
    return [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]


# A worker that has a child in a session of its own, as the real one has its runner.
WORKER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("runner", child.pid, flush=True)
time.sleep(600)
"""


def small_services(wiring: Wiring) -> Services:
    """Stand-ins that start in a moment; how Noisemill's own commands behave is tested elsewhere."""
    soon = timedelta(seconds=5)
    api = Command(
        name="api",
        argv=serving(wiring.api_port),
        env=wiring.env(),
        answers=lambda: http_get(wiring.api_port, "/")[0] == 200,
        grace=soon,
    )
    worker = Command(
        name="worker-train-1",
        argv=[sys.executable, "-c", WORKER],
        env=wiring.env(),
        answers=lambda: True,
        grace=soon,
    )
    return Services(setup=[sys.executable, "-c", "print('set up')"], parts=[api, worker])


def never_ready_services(wiring: Wiring) -> Services:
    """The same, with a worker that never answers."""
    services = small_services(wiring)
    api, worker = services.parts
    return replace(services, parts=[api, replace(worker, answers=lambda: False)])


if __name__ == "__main__":
    by_name = {factory.__name__: factory for factory in (small_services, never_ready_services)}
    Stack(Path(sys.argv[1]), say=lambda line: print(line, flush=True), services=by_name[sys.argv[2]]).run()
