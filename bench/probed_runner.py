"""``worker.runner``, which notes when it first said something of each kind about each job.

A line of JSON per note, appended to the file that ``BENCH_NOTES`` names, with the time of the machine's clock: those
who read it run on the same machine. With ``BENCH_EXECUTES=nothing`` every job is done as soon as it is assigned, and
torch is not loaded: what is left is what jobs cost that do nothing.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worker import runner
from worker.channel import Channel

NOTES = Path(os.environ["BENCH_NOTES"])
_send = Channel.send
_noted: set[tuple[str, str]] = set()


def _noting(self: Channel, message: Mapping[str, Any]) -> bool:
    kind, job_id = message["type"], message.get("job_id", "")
    if (kind, job_id) not in _noted:
        _noted.add((kind, job_id))
        with NOTES.open("a") as file:
            file.write(json.dumps({"job_id": job_id, "said": kind, "at": time.time()}) + "\n")
    return _send(self, message)


if __name__ == "__main__":
    Channel.send = _noting
    if os.environ.get("BENCH_EXECUTES") == "nothing":
        runner.server = lambda job_type: None
        runner.executor = lambda job_type: lambda run: {}
        runner.choose_device = lambda settings: "cpu"
    runner.main()
