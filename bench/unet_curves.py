"""Whether bfloat16 costs a UNet's training anything: loss curves beside those of float32.

Trainings of one seed have the same initial weights, batches and noise, and differ in precision alone. Told are the
losses of each (means over tenths of the training, and the held-out loss of the averaged weights at its end), and
whether precisions differ by less than seeds do.

    python -m bench.unet_curves [--preset xs] [--steps 400] [--seeds 3] [--output FILE]
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from bench.unet import CPU, machine
from shared.specs import DiffusionSpec
from worker.engine.evaluation import evaluate
from worker.engine.numerics import exact
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.kernels.noise import Domain, Noise

BATCH: Final = 32
SIDE: Final = 16
PRECISIONS: Final = ("fp32", "bf16")
POINTS: Final = 10


def gratings(step: int) -> Tensor:
    """A batch of bytes: waves of random direction, length and phase, in three colours."""
    noise = Noise.of_step(Domain.TRAINING, 1, step, range(BATCH), CPU)
    kx, ky, phase = (noise.uniform(stream=stream).double()[:, None, None] for stream in range(3))
    place = torch.arange(SIDE, dtype=torch.float64) / SIDE
    angle = 6.28 * (3 * kx * place[None, None, :] + 3 * ky * place[None, :, None] + phase)
    colours = [(angle + turn).sin() for turn in (0.0, 1.0, 2.0)]
    return ((torch.stack(colours, 1) + 1) * 127.5).round().to(torch.uint8)


def curve(preset: str, precision: str, seed: int, steps: int) -> dict[str, Any]:
    """One training's losses."""
    fields = {
        "family": "diffusion",
        "dataset": "ds_" + "0" * 32,
        "model": "bench",
        "network": "unet",
        "ema_decay": 0.99,
    }
    given = {"preset": preset, "precision": precision, "seed": seed, "steps": steps, "batch_size": BATCH}
    spec = DiffusionSpec.model_validate(fields | given)
    trainer = Trainer(FAMILIES["diffusion"], spec, DataInfo(shape=(3, SIDE, SIDE)), CPU)
    with exact():
        losses = [trainer.advance({"image": gratings(step)})["loss"] for step in range(steps)]
        held_out = evaluate(trainer, ({"image": gratings(10**6 + number)} for number in range(8)))["loss"]
    length = max(1, steps // POINTS)
    tenths = [statistics.mean(losses[start : start + length]) for start in range(0, steps, length)]
    return {"curve": [round(loss, 5) for loss in tenths], "held_out": round(held_out, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="xs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("bench/results/unet/curves.json"))
    options = parser.parse_args()
    curves = {
        precision: [curve(options.preset, precision, seed, options.steps) for seed in range(options.seeds)]
        for precision in PRECISIONS
    }
    ends = {precision: [one["held_out"] for one in trained] for precision, trained in curves.items()}
    apart = statistics.mean(b - a for a, b in zip(*(ends[precision] for precision in PRECISIONS), strict=True))
    between_seeds = max(ends["fp32"]) - min(ends["fp32"])
    report = {
        "machine": machine(torch.get_num_threads()),
        "preset": options.preset,
        "steps": options.steps,
        "curves": curves,
        "bf16_less_fp32": round(apart, 5),
        "between_seeds_of_fp32": round(between_seeds, 5),
        "within_noise": abs(apart) <= between_seeds,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
