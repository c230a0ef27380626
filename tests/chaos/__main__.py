"""``make chaos``: one run, its report on stdout and in the file that CHAOS_REPORT names; 1 if anything was violated."""

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

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
        app="tests.chaos.unfenced" if options.unfenced else "worker.app",
        mount_disk=True,
    )
    goals = Goals(kills=options.minimum_kills, zombies=options.minimum_zombies, kill_every=options.kill_every)
    report = run(Wanted(setup=setup, jobs=options.jobs, goals=goals, limit=options.limit))
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
    parser.add_argument("--unfenced", action="store_true", help="the control: the same without fences must fail")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
