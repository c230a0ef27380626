"""A UNet of 6.5 million parameters on a CPU: a training step and DDIM sampling, beside diffusers' in the same run.

The peers have the same architecture, data, loss, optimizer, clipping and averaging: diffusers as its own training
script sets it up (float32, an optimizer and an average that go tensor by tensor), and tuned by hand in every way that
its documentation names; those in bf16 are left out on a processor that has no instructions for it. All take turns, in
another order each round; told are medians, their spread and ratios.

    python -m bench.unet [--rounds 5] [--steps 50] [--threads 2] [--no-compile] [--output FILE]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import diffusers
import torch

from bench.unet_peers import PEERS, Peer, PeerSampler, PeerTraining
from shared.specs import DiffusionSpec
from shared.specs.tasks import Generate
from worker.engine.numerics import Numerics, exact, for_sampling, multiplies_bf16, processor_name
from worker.engine.sampling import Tile, sample
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import DataInfo, Draw
from worker.kernels import native

Maker = Callable[[], Callable[[], Any]]
"""Makes what can be run again and again."""

BATCH: Final = 16
SHAPE: Final = (3, 32, 32)
CPU: Final = torch.device("cpu")
DEFAULT: Final = "diffusers"
OURS: Final = "noisemill"
TRAIN_RATIOS: Final = {"default": 3.0, "tuned": 2.0}
SAMPLE_RATIOS: Final = {"default": 4.5, "tuned": 1.8}
"""How many times as fast it shall be, in ``STEPS`` steps and beside peers that are compiled, too."""
STEPS: Final = 50


def trainer_of(**fields: Any) -> Trainer[Any, Any]:
    """Noisemill's training with what a spec has by default."""
    spec = DiffusionSpec(
        family="diffusion", dataset="ds_" + "0" * 32, model="bench", network="unet", preset="s", objective="eps",
        batch_size=BATCH, steps=100_000, learning_rate=1e-4, ema_decay=0.9999, **fields,
    )  # fmt: skip
    return Trainer(FAMILIES["diffusion"], spec, DataInfo(shape=SHAPE), CPU)


def images() -> torch.Tensor:
    """One batch of bytes; what they show does not change how long they take."""
    numbers = torch.arange(BATCH * SHAPE[0] * SHAPE[1] * SHAPE[2], dtype=torch.int64)
    return (numbers * 2654435761 % 4093 % 256).to(torch.uint8).unflatten(0, (BATCH, *SHAPE))


def our_training(**fields: Any) -> Callable[[], float]:
    trainer, batch = trainer_of(**fields), {"image": images()}

    def step() -> float:
        with exact():
            return trainer.advance(batch)["loss"]

    return step


def our_sampler(steps: int) -> Callable[[], torch.Tensor]:
    """The engine's way: a tile of as many slots as it chooses, on the network as it prepares it."""
    trainer = trainer_of()
    net = for_sampling(trainer.average, Numerics.choose(trainer.spec, CPU))
    sampler = FAMILIES["diffusion"].tasks["generate"](trainer.spec, trainer.data)
    request = Generate(task="generate", model="bench@1", num_samples=BATCH, solver="ddim", steps=steps)
    draws = [Draw(request=request, index=index) for index in range(BATCH)]
    with exact():
        tile = Tile(net, sampler, draws[0], CPU)

    def draw() -> torch.Tensor:
        with exact():
            return torch.stack([image for _, image in sample(tile, draws)])

    return draw


def measured(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in rounds that begin with another contestant each time and change direction."""
    names, seconds = list(contestants), {name: [] for name in contestants}
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned if number % 2 == 0 else reversed(turned):
            began = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def warmed_up(
    make: Mapping[str, Callable[[], Callable[[], Any]]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Those that can run, each having run twice (which compiles what is compiled), and why others cannot."""
    ready: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, maker in make.items():
        try:
            ready[name] = maker()
            for _ in range(2):
                ready[name]()
        except Exception as error:
            ready.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            if name == OURS:
                raise
        sys.stderr.write(f"{name}: {failed.get(name, 'ready')}\n")
    return ready, failed


def compared(
    make: Mapping[str, Callable[[], Callable[[], Any]]], rounds: int, goals: Mapping[str, float]
) -> dict[str, Any]:
    """Medians of all, and how many times as fast ours is as the default and as the fastest of the others."""
    ready, failed = warmed_up(make)
    seconds = measured(ready, rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    tuned = min((name for name in medians if name not in (OURS, DEFAULT)), key=medians.__getitem__)
    ratios = {"default": medians[DEFAULT] / medians[OURS], "tuned": medians[tuned] / medians[OURS]}
    return {
        "seconds": {name: summary(times) for name, times in sorted(seconds.items(), key=lambda one: medians[one[0]])},
        "failed": failed,
        "best_tuned": tuned,
        "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "goals": dict(goals),
        "reached": all(ratios[name] >= goal for name, goal in goals.items()),
    }


def summary(times: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(times), 4), "least": round(min(times), 4), "most": round(max(times), 4)}


def machine(threads: int) -> dict[str, Any]:
    return {
        "processor": processor_name(),
        "threads": threads,
        "load": [round(load, 2) for load in os.getloadavg()],
        "bf16": multiplies_bf16(CPU),
        "kernels": native.is_available(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def chosen(*, with_compiled: bool) -> list[Peer]:
    """Those that this processor can be expected to be fast with."""
    has_bf16 = multiplies_bf16(CPU)
    return [
        peer
        for peer in PEERS
        if (with_compiled or not peer.compiled) and (has_bf16 or not (peer.autocast or peer.pure))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", choices=["train", "sample"])
    parser.add_argument("--output", type=Path, default=Path("bench/results/unet/cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers = chosen(with_compiled=not options.no_compile)
    report: dict[str, Any] = {"machine": machine(options.threads), "batch": BATCH, "rounds": options.rounds}
    if options.only != "sample":
        make = {OURS: our_training} | {peer.name: lambda peer=peer: PeerTraining(peer, images()).step for peer in peers}
        report["train_step"] = compared(make, options.rounds, {} if options.no_compile else TRAIN_RATIOS)
    if options.only != "train":
        steps = options.steps
        make = {OURS: lambda: our_sampler(steps)}
        make |= {peer.name: lambda peer=peer: PeerSampler(peer, BATCH, steps).draw for peer in peers}
        is_whole = steps == STEPS and not options.no_compile
        report[f"ddim_{steps}"] = compared(make, options.rounds, SAMPLE_RATIOS if is_whole else {})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
