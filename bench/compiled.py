"""A training step by plain and by compiled code, and what compiling costs: cold, and where the cache has the code.

As a training does it: blocks are compiled by a process of their own, while plain steps go on. Told are the time to the
first step with and without a compilation to come, the steps' medians as both take turns, how long the process took and
how long the training stood still at the switch.

    python -m bench.compiled [--network unet] [--preset xs] [--batch 16] [--rounds 7] [--threads 2] [--output FILE]
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from bench.unet import SHAPE, machine, measured, summary
from shared.specs import DiffusionSpec
from worker.code_cache import CodeCache
from worker.engine.blocks import Call, compile_blocks, recorded
from worker.engine.numerics import exact
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.jobs.compiler import Compiler, code_name, order_of

CPU: Final = torch.device("cpu")
WHAT: Final = ("compiling", "switching")
AT_LEAST: Final = 1.0
"""Compiled code that is no faster is of no use."""


def trainer_of(options: argparse.Namespace) -> Trainer[Any, Any]:
    spec = DiffusionSpec(
        family="diffusion", dataset="ds_" + "0" * 32, model="bench", network=options.network, preset=options.preset,
        batch_size=options.batch, steps=100_000, precision="fp32", channels_last=options.channels_last,
    )  # fmt: skip
    return Trainer(FAMILIES["diffusion"], spec, DataInfo(shape=SHAPE), CPU)


def batch_of(options: argparse.Namespace) -> Mapping[str, torch.Tensor]:
    numbers = torch.arange(options.batch * SHAPE[0] * SHAPE[1] * SHAPE[2], dtype=torch.int64)
    return {"image": (numbers * 2654435761 % 4093 % 256).to(torch.uint8).unflatten(0, (options.batch, *SHAPE))}


def timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def compiled(
    trainer: Trainer[Any, Any], calls: list[Call], cache: CodeCache, step: Callable[[], Any]
) -> dict[str, Any]:
    """Compile beside plain steps, then switch: seconds of both, and how many steps were done meanwhile."""
    began, num_steps = time.perf_counter(), 0
    compiler = Compiler(
        order_of("training", trainer.spec, trainer.data, trainer.numerics, calls, cache) | {"device": "cpu"}
    )
    try:
        while not compiler.is_done:
            step()
            num_steps += 1
        seconds = time.perf_counter() - began
        compiler.outcome()
    finally:
        compiler.close()
    torch.compiler.reset()
    name = code_name("training", trainer.computing, calls, CPU)
    with cache.opened(name, alone=False) as folder, trainer.numerics.products():
        switch = timed(lambda: compile_blocks(trainer.computing, calls, CPU, folder))
    return {"compiling": seconds, "switching": switch, "plain_steps_meanwhile": num_steps}


def report_of(options: argparse.Namespace, cache: CodeCache) -> dict[str, Any]:
    batch = batch_of(options)
    plain, switched = trainer_of(options), trainer_of(options)
    first = {"plain": timed(lambda: plain.advance(batch))}
    with recorded(switched.computing) as calls:
        first["to be compiled"] = timed(lambda: switched.advance(batch))
    cold = compiled(switched, calls, cache, lambda: plain.advance(batch))
    again = trainer_of(options)
    warm = compiled(again, calls, cache, lambda: plain.advance(batch))
    again.numerics = again.numerics.switched(again.step)
    again.advance(batch)
    both = {"plain": lambda: plain.advance(batch), "compiled": lambda: again.advance(batch)}
    seconds = {name: summary(times) for name, times in measured(both, options.rounds).items()}
    ratio = seconds["plain"]["median"] / seconds["compiled"]["median"]
    asked = {"figure": "a step by compiled code: times as fast as by plain", "at least": AT_LEAST, "value": ratio}
    once = {f"first step, {name}": one for name, one in first.items()}
    once |= {f"{what}, {when}": one[what] for when, one in (("cold", cold), ("warm", warm)) for what in WHAT}
    return {
        "blocks_compiled": len(calls),
        "plain_steps_meanwhile": {"cold": cold["plain_steps_meanwhile"], "warm": warm["plain_steps_meanwhile"]},
        "asked": [asked | {"reached": ratio >= AT_LEAST}],
        "step": {"seconds": seconds},
        "once": {"seconds": {name: summary([one]) for name, one in once.items()}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["unet", "dit"], default="unet")
    parser.add_argument("--preset", choices=["xs", "s", "b"], default="xs")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--output", type=Path, default=Path("bench/results/compiled/cpu.json"))
    options = parser.parse_args()
    about = {"network": options.network, "preset": options.preset, "batch": options.batch, "precision": "fp32"}
    with tempfile.TemporaryDirectory(prefix="noisemill-") as folder, exact(options.threads):
        report = report_of(options, CodeCache(Path(folder) / "code", limit_bytes=2**30))
    told = {"machine": machine(options.threads) | about, "rounds": options.rounds, **report}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(told, indent=2) + "\n", "utf-8")
    json.dump(told, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
