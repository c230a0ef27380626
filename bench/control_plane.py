"""What the control plane costs, beside a service of FastAPI, Celery's ``delay()`` and ``AsyncResult``.

Real servers, one API process on each side, the same client, and the two sides take turns. Ours has each job in
PostgreSQL, on disk, before it answers; the peer has it in Valkey. Measured are submissions per second and their
latency at half that rate, what importing the API takes, the way of a submitted job to its first step and back, and the
start of a worker. Writes JSON, and prints how each figure stands to what was asked of it.

    python -m bench.control_plane [--quick] [--only submissions,first_step] [--out bench/results/control_plane]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

import psutil

from bench.control_plane_parts import REPOSITORY, SMALLEST, House, fsync_ms, house, notes_of, train
from bench.load import Load, Target, offer, one_by_one, saturate
from worker.engine.numerics import processor_name

T = TypeVar("T")

VERSIONS: Final = ("fastapi", "uvicorn", "uvloop", "httptools", "sqlalchemy", "psycopg", "celery", "kombu", "redis")
_IMPORT: Final = """
import sys, time
began = time.perf_counter()
__import__(sys.argv[1])
seconds = time.perf_counter() - began
import json, psutil
print(json.dumps({"seconds": seconds, "megabytes": psutil.Process().memory_info().rss / 1e6}))
"""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long and how often."""

    repeats: int = 5
    seconds: float = 5.0
    warm_up: float = 1.0
    connections: int = 32
    trips: int = 40
    pause: float = 0.2


QUICK: Final = Effort(repeats=1, seconds=0.3, warm_up=0.1, connections=4, trips=2, pause=0.0)


def turned(sides: Mapping[str, T], number: int) -> list[tuple[str, T]]:
    """All sides, in an order that begins with another one in each round and changes direction."""
    place = number % len(sides)
    names = [*sides][place:] + [*sides][:place]
    return [(name, sides[name]) for name in (names if number % 2 == 0 else reversed(names))]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median, and all that it is the median of."""
    told = [round(value, 4) for value in values]
    return {"median": round(statistics.median(values), 4), "min": min(told), "max": max(told), "all": told}


def measure_imports(here: House, effort: Effort) -> dict[str, Any]:
    """A fresh interpreter that imports the API; and what the serving process holds after its load."""
    found: dict[str, list[dict[str, float]]] = {"api.app": [], "bench.celery_service": []}
    for number in range(effort.repeats):
        for module, figures in turned(found, number):
            command = [sys.executable, "-c", _IMPORT, module]
            env = {**os.environ, **here.wiring.env(), **here.peer_env}
            done = subprocess.run(command, env=env, cwd=REPOSITORY, check=True, capture_output=True, text=True)
            figures.append(json.loads(done.stdout))
    return {
        side: {name: spread([one[name] for one in found[module]]) for name in ("seconds", "megabytes")}
        for side, module in (("ours", "api.app"), ("peer", "bench.celery_service"))
    }


def measure_submissions(here: House, effort: Effort) -> dict[str, Any]:
    """Both services as fast as they go, then each at half of that."""
    sides = {"ours": here.ours(), "ours_with_idempotency_key": here.ours(keyed=True), "peer": here.theirs()}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    busy: dict[str, list[float]] = {side: [] for side in sides}
    rung: list[float] = []
    with here.with_parts(here.api(), here.peer()):
        for number in range(effort.repeats):
            for side, target in turned(sides, number):
                here.clear()
                load = saturate(target, connections=effort.connections, seconds=effort.seconds, warm_up=effort.warm_up)
                rates[side].append(load.per_second)
                busy[side].append(load.quantile_ms(0.99))
                if side == "ours":
                    rung.append(_until_rung(here))
                    _require_recorded(here, load)
        halves = {side: statistics.median(found) / 2 for side, found in rates.items()}
        at_half = _at_half(here, effort, {side: (sides[side], rate) for side, rate in halves.items()})
        resident = {name: _megabytes(here, part) for name, part in (("ours", "api"), ("peer", "peer"))}
    return {
        "connections": effort.connections,
        "per_second": {side: spread(found) for side, found in rates.items()},
        "p99_ms_at_full_rate": {side: spread(found) for side, found in busy.items()},
        "ratio": round(statistics.median(rates["ours"]) / statistics.median(rates["peer"]), 3),
        "seconds_until_all_bells_were_rung": spread(rung),
        "at_half": at_half,
        "megabytes_serving": resident,
    }


def _at_half(here: House, effort: Effort, rates: Mapping[str, tuple[Target, float]]) -> dict[str, Any]:
    found: dict[str, list[Load]] = {side: [] for side in rates}
    for seed in range(effort.repeats):
        for side, (target, rate) in turned(rates, seed):
            here.clear()
            found[side].append(
                offer(target, per_second=rate, connections=effort.connections, seconds=effort.seconds, seed=seed)
            )
    return {
        side: {
            "offered_per_second": round(rates[side][1], 1),
            **{f"p{share * 100:g}_ms": spread([load.quantile_ms(share) for load in loads]) for share in (0.5, 0.99)},
        }
        for side, loads in found.items()
    }


def _until_rung(here: House) -> float:
    """Seconds after the last answer until every job's message was with the broker."""
    began = time.perf_counter()
    while here.sql("SELECT 1 FROM outbox WHERE sent_at IS NULL LIMIT 1"):
        time.sleep(0.01)
    return time.perf_counter() - began


def _require_recorded(here: House, load: Load) -> None:
    (recorded,) = here.sql("SELECT count(*) FROM jobs WHERE type = 'generate' AND state = 'queued'")[0]
    if recorded < len(load.latencies):
        raise RuntimeError(f"{len(load.latencies)} jobs were accepted, {recorded} are recorded")


def _megabytes(here: House, name: str) -> float:
    return round(psutil.Process(here.running[name][1].pid).memory_info().rss / 1e6, 1)


def measure_first_step(here: House, effort: Effort) -> dict[str, Any]:
    """A job for a model that is loaded, submitted when nothing else goes on; and its way back."""
    target = here.ours(Prefer="wait=30")
    first, whole, parts = list[float](), list[float](), dict[str, list[float]]()
    celery = list[float]()
    with here.with_parts(here.api(), here.worker(), here.peer_worker()):
        one_by_one(target, times=3, pause=0.0)
        trip = bare_celery(here)

        def ours() -> None:
            trips = one_by_one(target, times=effort.trips, pause=effort.pause)
            notes = notes_of(here, [one.answer["id"] for one in trips])
            first.extend(1000 * (notes[one.answer["id"]]["step"] - one.sent_at) for one in trips)
            whole.extend(1000 * one.seconds for one in trips)
            for one in trips:
                for name, spent in one.answer["metrics"].items():
                    parts.setdefault(name, []).append(spent)

        def theirs() -> None:
            celery.extend(trip(effort.pause) for _ in range(effort.trips))

        for number in range(effort.repeats):
            for _, measure in turned({"ours": ours, "peer": theirs}, number):
                measure()
    return {
        "milliseconds": quantiles(first),
        "smallest_job_round_trip_ms": quantiles(whole),
        "as_the_job_tells": {name: statistics.median(spent) for name, spent in parts.items()},
        "celery_round_trip_ms": quantiles(celery),
    }


def measure_no_op(here: House, effort: Effort) -> dict[str, Any]:
    """A job whose runner answers at once, against a bare task of the peer's; both from submission to known result."""
    ours, celery = list[float](), list[float]()
    target = here.ours(Prefer="wait=30")
    with here.with_parts(here.api(), here.worker(executes="nothing"), here.peer_worker()):
        one_by_one(target, times=3, pause=0.0)
        trip = bare_celery(here)
        for number in range(effort.repeats):
            for side, found in turned({"ours": ours, "peer": celery}, number):
                if side == "ours":
                    found += [1000 * one.seconds for one in one_by_one(target, times=effort.trips, pause=effort.pause)]
                else:
                    found += [trip(effort.pause) for _ in range(effort.trips)]
    return {
        "ours_ms": quantiles(ours),
        "celery_ms": quantiles(celery),
        "ratio": round(statistics.median(ours) / statistics.median(celery), 2),
    }


def bare_celery(here: House) -> Callable[[float], float]:
    """The peer's task without its API: a function that pauses and returns the milliseconds of ``delay().get()``."""
    os.environ.update(here.peer_env)
    from bench.celery_service import generate  # noqa: PLC0415  (reads its address when it is imported)

    def trip(pause: float) -> float:
        time.sleep(pause)
        began = time.perf_counter()
        generate.delay(dict(SMALLEST)).get(timeout=30)
        return 1000 * (time.perf_counter() - began)

    trip(0.0)
    return trip


def measure_cold_start(here: House, effort: Effort) -> dict[str, Any]:
    """From the start of a worker's process to the first sample of a job that waited for it is stored."""
    found: dict[str, list[float]] = {"first_sample": [], "runner_is_ready": [], "first_step": []}
    spec = {**SMALLEST, "model": "tiny-diffusion@1", "steps": 4}
    with here.with_parts(here.api()), here.client() as client:
        for seed in range(effort.repeats):
            job = client.submit({"type": "generate", "spec": {**spec, "seed": seed}})
            here.notes.write_text("")
            began = time.time()
            here.start(here.worker())
            done = client.wait(job.id, 120)
            notes = notes_of(here, [job.id, ""])
            here.await_ready(here.worker())
            here.stop(here.worker().name)
            if done.state != "succeeded":
                raise RuntimeError(f"the job {done.state}: {done.error}")
            moments = {"first_sample": notes[job.id]["artifact"], "first_step": notes[job.id]["step"]}
            for name, moment in {**moments, "runner_is_ready": notes[""]["ready"]}.items():
                found[name].append(moment - began)
    return {f"{name}_seconds": spread(seconds) for name, seconds in found.items()}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    picked = {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (10, 50, 90, 99)}
    return {"count": len(ordered), **{name: round(value, 2) for name, value in picked.items()}}


SECTIONS: Final[Mapping[str, Callable[[House, Effort], dict[str, Any]]]] = {
    "imports": measure_imports,
    "submissions": measure_submissions,
    "first_step": measure_first_step,
    "no_op": measure_no_op,
    "cold_start": measure_cold_start,
}

ASKED: Final[Sequence[tuple[str, str, float]]] = (
    ("submissions/ratio", "at least", 3.0),
    ("submissions/at_half/ours/p99_ms/median", "at most", 50.0),
    ("imports/ours/seconds/median", "at most", 1.5),
    ("imports/ours/megabytes/median", "at most", 150.0),
    ("first_step/milliseconds/p50", "at most", 50.0),
    ("no_op/ratio", "at most", 2.0),
    ("cold_start/first_sample_seconds/median", "at most", 3.0),
)


def judged(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each figure that something was asked of, and whether it is reached."""
    verdicts: list[dict[str, Any]] = []
    for path, sense, bound in ASKED:
        value: Any = figures
        for name in path.split("/"):
            value = value.get(name) if value is not None else None
        if value is not None:
            reached = value >= bound if sense == "at least" else value <= bound
            verdicts.append({"figure": path, sense: bound, "value": value, "reached": reached})
    return verdicts


def machine(here: House) -> dict[str, Any]:
    names = ("synchronous_commit", "fsync", "server_version")
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "fsync_ms": round(fsync_ms(here.folder), 3),
        "postgres": {name: here.sql(f"SHOW {name}")[0][0] for name in names},
        "versions": {name: version(name) for name in VERSIONS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="see whether all of it runs; its figures mean nothing")
    parser.add_argument("--only", default=",".join(SECTIONS), help="names of sections, separated by commas")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON file")
    options = parser.parse_args()
    # As in an installation, where Python keeps what it has compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    effort, sections = (QUICK if options.quick else Effort()), options.only.split(",")
    report: dict[str, Any] = {"quick": options.quick, "effort": vars(effort), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="noisemill-bench-") as folder, house(Path(folder)) as here:
        report["machine"] = machine(here)
        with here.with_parts(here.api(), here.worker()):
            train(here)
        figures = {}
        for name in sections:
            here.clear()
            figures[name] = SECTIONS[name](here, effort)
            print(name, json.dumps(figures[name]), flush=True)
    report |= {"asked": judged(figures), "figures": figures}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "control_plane.json").write_text(json.dumps(report, indent=2) + "\n")
    for verdict in report["asked"]:
        print(json.dumps(verdict))


if __name__ == "__main__":
    main()
