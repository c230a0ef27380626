"""``make chaos``: the control, one run, its report on stdout and in the file that CHAOS_REPORT names.

Exits with 1 if anything was violated, or if the control without fences passed.
"""

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tests.chaos.control import control
from tests.chaos.nemesis import Goals
from tests.chaos.run import Wanted, run
from tests.chaos.servers import Setup

logger = logging.getLogger("tests.chaos")


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    # A run that is told to end ends what it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="noisemill-chaos-"))
    logger.info("working in %s", folder)
    setup = Setup(
        folder=folder,
        workers=options.workers,
        lease=options.lease,
        seed=options.seed,
        mount_disk=True,
    )
    goals = Goals(kills=options.minimum_kills, zombies=options.minimum_zombies, kill_every=options.kill_every)
    # First: a run that could not see the bug that it is for need not be made.
    without = control(folder / "control", options.seed)
    logger.info("the control without fences %s", "failed, as it must" if without.failed else "PASSED")
    report = run(Wanted(setup=setup, jobs=options.jobs, goals=goals, limit=options.limit))
    report = replace(report, control=without.as_json(), violations=[*without.complaints, *report.violations])
    print(report.as_json())
    if named := os.environ.get("CHAOS_REPORT"):
        report.write(Path(named))
    if report.is_clean and options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        sys.stderr.write(f"logs, faults and history are in {folder}\n")
    return 0 if report.is_clean else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=240)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--minimum-kills", type=int, default=100)
    parser.add_argument("--minimum-zombies", type=int, default=50)
    parser.add_argument("--kill-every", type=float, default=4.0, help="seconds, on average")
    parser.add_argument("--limit", type=float, default=3000.0, help="seconds after which faults end in any case")
    parser.add_argument("--lease", type=float, default=15.0, help="seconds")
    parser.add_argument("--folder", type=Path, help="where servers keep their data and logs; kept afterwards")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
