"""Requests that come one after another, served in a shared tile, and one by one at a batch of one.

Thirty-two requests for one sample each, of 10 to 50 DDIM steps, at the moments of a Poisson process whose mean rate is
``--load`` times what serving at a batch of one keeps up with. All ways of serving have the same network (the UNet of
``bench/unet.py``, prepared as for jobs of ``precision: auto``: bf16 where the processor multiplies it), the same
requests and the same moments; they take turns, in another order each round. The loop of diffusers' pipeline at a batch
of one stands beside them, by itself and behind LitServe (``bench/litserve_service.py``), over HTTP. Told are makespan,
95th percentile of latency, and what one request alone costs in the exact tile.

    pip install litserve
    python -m bench.serving [--rounds 5] [--requests 32] [--load 4] [--threads 2] [--output FILE]
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from bench.unet import CPU, SHAPE, machine, trainer_of
from bench.unet_peers import PEERS
from shared.specs.tasks import Generate
from worker.engine.numerics import Numerics, exact, for_sampling
from worker.engine.sampling import Line, LooseTile, Tile
from worker.families import FAMILIES
from worker.families.family import Draw

FEWEST, MOST = 10, 50
LONGEST: Final = 3600.0
"""Seconds that an answer over HTTP is waited for."""
GOALS: Final = {
    "exact makespan / serial": 0.5,
    "exact p95 / serial": 0.5,
    "relaxed makespan / serial": 0.42,
    "exact makespan / relaxed": 1.3,
    "one request, exact tile / batch 1": 3.0,
}
"""What each ratio shall be at most."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request and the moment it comes, in seconds."""

    after: float
    steps: int
    seed: int


class Network:
    """The model, and the tiles that serve it; first weights are enough to be timed."""

    def __init__(self) -> None:
        trainer = trainer_of()
        self.net = for_sampling(trainer.average, Numerics.of_sampling(trainer.spec, "auto", CPU))
        self.sampler = FAMILIES["diffusion"].tasks["generate"](trainer.spec, trainer.data)

    def line(self, kind: type[Tile[Any]], width: int | None = None) -> Line[Any]:
        with exact():
            return Line(kind(self.net, self.sampler, self.draw(Arrival(after=0, steps=MOST, seed=0)), CPU, width))

    def draw(self, arrival: Arrival) -> Draw[Any]:
        asked = {"task": "generate", "model": "bench@1", "num_samples": 1, "solver": "ddim"}
        request = Generate.model_validate(asked | {"steps": arrival.steps, "seed": arrival.seed})
        return Draw(request=request, index=0, owner=arrival)


Serve = Callable[[Sequence[Arrival]], list[float]]
"""Serves them and returns when each was done, in seconds from the beginning."""


def shared(network: Network, line: Line[Any]) -> Serve:
    """Requests join between two steps."""

    def serve(arrivals: Sequence[Arrival]) -> list[float]:
        coming, done = list(arrivals), dict[Any, float]()
        began = time.perf_counter()
        with exact():
            while coming or not line.is_empty:
                now = time.perf_counter() - began
                if line.is_empty and coming[0].after > now:
                    time.sleep(coming[0].after - now)
                    continue
                while coming and coming[0].after <= now:
                    line.add([network.draw(coming.pop(0))])
                for draw, _ in line.step():
                    done[draw.owner] = time.perf_counter() - began
        return [done[one] for one in arrivals]

    return serve


def one_by_one(draw: Callable[[Arrival], object]) -> Serve:
    """Each when the one before is done."""

    def serve(arrivals: Sequence[Arrival]) -> list[float]:
        began, done = time.perf_counter(), list[float]()
        for one in arrivals:
            time.sleep(max(0.0, one.after - (time.perf_counter() - began)))
            draw(one)
            done.append(time.perf_counter() - began)
        return done

    return serve


def alone(network: Network, line: Line[Any]) -> Callable[[Arrival], object]:
    def draw(arrival: Arrival) -> None:
        with exact():
            line.add([network.draw(arrival)])
            while not line.is_empty:
                line.step()

    return draw


def as_diffusers_does() -> Callable[[Arrival], object]:
    """The loop of its unconditional pipeline, in float32, as it comes."""
    net = PEERS[0].network().eval()

    @torch.no_grad()
    def draw(arrival: Arrival) -> torch.Tensor:
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(arrival.steps)
        x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(arrival.seed))
        for step in scheduler.timesteps:
            x = scheduler.step(net(x, step).sample, int(step), x, return_dict=False)[0]
        return x

    return draw


@contextmanager
def litserve() -> Iterator[Serve]:
    """A server with the same loop and as many threads; who asks waits for the answer, each in a thread.

    Raises:
        RuntimeError: it did not come up; LitServe is not installed, for one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "bench.litserve_service", str(port), str(torch.get_num_threads())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as server:
        try:
            _await(service, server)
            with httpx.Client(base_url=service, timeout=LONGEST, limits=httpx.Limits(max_connections=None)) as client:
                yield partial(_over_http, client)
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def _await(service: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        with suppress(httpx.HTTPError):
            if httpx.get(f"{service}/health").is_success:
                return
        if server.poll() is not None:
            break
        time.sleep(0.25)
    raise RuntimeError("LitServe did not come up")


def _over_http(client: httpx.Client, arrivals: Sequence[Arrival]) -> list[float]:
    began = time.perf_counter()

    def ask(one: Arrival) -> float:
        time.sleep(max(0.0, one.after - (time.perf_counter() - began)))
        client.post("/predict", json={"steps": one.steps, "seed": one.seed}).raise_for_status()
        return time.perf_counter() - began

    with ThreadPoolExecutor(len(arrivals)) as threads:
        return list(threads.map(ask, arrivals))


def process(num_requests: int, seconds_of_a_step: float, load: float) -> list[Arrival]:
    """The same requests in every run; their moments scale with the machine."""
    chance = random.Random(20)
    mean = seconds_of_a_step * (FEWEST + MOST) / 2 / load
    moment, arrivals = 0.0, list[Arrival]()
    for seed in range(num_requests):
        arrivals.append(Arrival(after=moment, steps=chance.randint(FEWEST, MOST), seed=seed))
        moment += chance.expovariate(1 / mean)
    return arrivals


def figures(arrivals: Sequence[Arrival], done: Sequence[float]) -> dict[str, float]:
    waited = sorted(end - one.after for one, end in zip(arrivals, done, strict=True))
    return {
        "makespan": max(done),
        "p95": waited[max(0, round(0.95 * len(waited)) - 1)],
        "p50": statistics.median(waited),
    }


def step_seconds(draw: Callable[[Arrival], object], steps: int = 10) -> float:
    began = time.perf_counter()
    draw(Arrival(after=0, steps=steps, seed=1))
    return (time.perf_counter() - began) / steps


def compared(rounds: int, num_requests: int, load: float, served: Serve) -> dict[str, Any]:
    network = Network()
    lines = {"exact": network.line(Tile), "relaxed": network.line(LooseTile), "serial": network.line(Tile, 1)}
    single = {"exact": alone(network, lines["exact"]), "serial": alone(network, lines["serial"])}
    ways = {name: shared(network, lines[name]) for name in ("exact", "relaxed")}
    ways |= {"serial": one_by_one(single["serial"]), "diffusers": one_by_one(as_diffusers_does()), "LitServe": served}
    for draw in single.values():
        step_seconds(draw)
    arrivals = process(num_requests, min(step_seconds(single["serial"]) for _ in range(3)), load)
    told: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    lone: dict[str, list[float]] = {name: [] for name in single}
    names = list(ways)
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned if number % 2 == 0 else reversed(turned):
            told[name].append(figures(arrivals, ways[name](arrivals)))
        for name in single if number % 2 == 0 else reversed(single):
            lone[name].append(step_seconds(single[name], MOST))
    return summary(told, lone) | {"tile": lines["exact"].tile.width, "span_of_arrivals": round(arrivals[-1].after, 2)}


def summary(told: dict[str, list[dict[str, float]]], lone: dict[str, list[float]]) -> dict[str, Any]:
    seconds = {
        name: {figure: spread([one[figure] for one in rounds]) for figure in rounds[0]} for name, rounds in told.items()
    }
    alone = {name: spread(times) for name, times in lone.items()}
    of = {name: {figure: one["median"] for figure, one in figures.items()} for name, figures in seconds.items()}
    ratios = {
        "exact makespan / serial": of["exact"]["makespan"] / of["serial"]["makespan"],
        "exact p95 / serial": of["exact"]["p95"] / of["serial"]["p95"],
        "relaxed makespan / serial": of["relaxed"]["makespan"] / of["serial"]["makespan"],
        "exact makespan / relaxed": of["exact"]["makespan"] / of["relaxed"]["makespan"],
        "one request, exact tile / batch 1": alone["exact"]["median"] / alone["serial"]["median"],
        "exact makespan / diffusers": of["exact"]["makespan"] / of["diffusers"]["makespan"],
        "exact makespan / LitServe": of["exact"]["makespan"] / of["LitServe"]["makespan"],
        "exact p95 / LitServe": of["exact"]["p95"] / of["LitServe"]["p95"],
    }
    return {
        "seconds": seconds,
        "seconds of a step, one request": alone,
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "asked": [
            {"figure": name, "at most": most, "value": round(ratios[name], 3), "reached": ratios[name] <= most}
            for name, most in GOALS.items()
        ],
    }


def spread(numbers: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(numbers), 4), "least": min(numbers), "most": max(numbers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--load", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with litserve() as served:
        found = compared(options.rounds, options.requests, options.load, served)
    about = {
        "rounds": options.rounds,
        "requests": options.requests,
        "load": options.load,
        "fewest": FEWEST,
        "most": MOST,
    }
    text = json.dumps({"machine": machine(options.threads), "run": about} | found, indent=2)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
