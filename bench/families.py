"""Training of a conv VAE and of a DCGAN on a CPU, beside pythae and a plain PyTorch script in the same run; training of
a UNet and drawing with it beside denoising-diffusion-pytorch.

Digits' shapes, the batch and the networks that a spec has by default. Ours is the engine's trainer with all that it
does in a job besides: averages, clipping, keyed noise and batches. pythae trains in its own loop with its own loader,
float32 and AdamW; the script is that of PyTorch's tutorial, float32 and two Adam optimizers, on a batch at hand.
The two UNets are of different architectures, with nearly as many parameters: what a forward pass of each takes is told.

    pip install --no-deps pythae==0.1.2 imageio && pip install cloudpickle scikit-learn tqdm
    pip install --no-deps denoising-diffusion-pytorch==2.3.4 ema-pytorch accelerate pytorch-fid einops scipy
    python -m bench.families [--rounds 7] [--threads 2] [--output FILE]

(Without ``--no-deps`` pythae brings a backport of ``dataclasses`` that no Python of today needs.)
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import ddpm_peer, unet
from bench.ddpm_peer import DDPM, num_parameters
from bench.device_parts import images_of, trainer_of
from bench.family_peers import (
    PYTHAE,
    beginning_with,
    gan_discriminator,
    gan_generator,
    pythae_epoch,
    tutorial_step,
    vae_decoder,
    vae_encoder,
)
from bench.timing import Clock, Maker, Step, Timing
from shared.specs import GanSpec, VaeSpec
from shared.specs.training import TrainSpec
from worker.engine.numerics import exact, fingerprint
from worker.engine.order import BatchOrder
from worker.families.family import DataInfo

CPU: Final = torch.device("cpu")
SHAPE: Final = (1, 28, 28)
OURS, OURS_FP32, SCRIPT = "noisemill", "noisemill in fp32", "PyTorch's tutorial"
DDIM_STEPS: Final = 10
STEPS: Final = 8
"""Of an epoch, the unit of pythae's loop."""
NAMED: Final = {"dataset": "ds_" + "0" * 32, "model": "bench"}
GOALS: Final = {"conv VAE": (PYTHAE, 3.0), "DCGAN": (SCRIPT, 1.5)}
"""The peer of each, and how many times as fast as it ours shall be."""


def our_epoch(spec: TrainSpec, images: torch.Tensor) -> Step:
    """As many steps as batches are in ``images``, each of its own batch."""
    trainer = trainer_of(spec, DataInfo(shape=SHAPE), CPU)
    order = BatchOrder(len(images), spec.batch_size, spec.seed)

    def epoch() -> None:
        with exact():
            for _ in range(len(images) // spec.batch_size):
                trainer.advance({"image": images[torch.from_numpy(order.at(trainer.step))]})

    return epoch


def conv_vae(clock: Clock) -> dict[str, Timing]:
    """A step of each, as a part of an epoch with its loader."""
    spec = VaeSpec.model_validate({"family": "vae", "network": "conv", **NAMED})
    images = images_of(STEPS * spec.batch_size, SHAPE, CPU)

    def theirs() -> Step:
        net = trainer_of(spec, DataInfo(shape=SHAPE), CPU).net
        sizes = spec.base_channels, spec.latent_dim
        encoder = beginning_with(net.encoder.parameters(), vae_encoder(*sizes))
        decoder = beginning_with(net.decoder.parameters(), vae_decoder(*sizes))
        return pythae_epoch(encoder, decoder, images, spec, folder)

    makers: dict[str, Maker] = {
        OURS: lambda: our_epoch(spec, images),
        OURS_FP32: lambda: our_epoch(spec.model_copy(update={"precision": "fp32"}), images),
        PYTHAE: theirs,
    }
    with tempfile.TemporaryDirectory() as folder:
        return clock.compete(makers, dict.fromkeys(makers, STEPS))


def dcgan(clock: Clock) -> dict[str, Timing]:
    """A step of both networks; ours makes its batch, the script has it."""
    spec = GanSpec.model_validate({"family": "gan", "network": "dcgan", **NAMED})
    images = images_of(spec.batch_size, SHAPE, CPU)

    def theirs() -> Step:
        net = trainer_of(spec, DataInfo(shape=SHAPE), CPU).net
        generator = beginning_with(net.generator.parameters(), gan_generator(spec.base_channels, spec.latent_dim))
        discriminator = beginning_with(net.discriminator.parameters(), gan_discriminator(spec.base_channels))
        return tutorial_step(generator, discriminator, images, spec.latent_dim)

    makers: dict[str, Maker] = {
        OURS: lambda: our_epoch(spec, images),
        OURS_FP32: lambda: our_epoch(spec.model_copy(update={"precision": "fp32"}), images),
        SCRIPT: theirs,
    }
    return clock.compete(makers)


def unet_training(clock: Clock) -> dict[str, Timing]:
    """A step on a batch at hand."""
    batch = unet.images()
    size = num_parameters(unet.trainer_of().net)
    makers: dict[str, Maker] = {
        OURS: unet.our_training,
        OURS_FP32: lambda: unet.our_training(precision="fp32"),
        DDPM: lambda: ddpm_peer.training(ddpm_peer.network(unet.SHAPE, size), batch),
    }
    return clock.compete(makers)


def unet_drawing(clock: Clock) -> dict[str, Timing]:
    """Sixteen images in ten steps of DDIM."""
    size = num_parameters(unet.trainer_of().net)
    about = {"batch": unet.BATCH, "steps": DDIM_STEPS}
    makers: dict[str, Maker] = {
        OURS: lambda: unet.our_sampler(DDIM_STEPS),
        DDPM: lambda: ddpm_peer.drawing(ddpm_peer.network(unet.SHAPE, size), unet.SHAPE[-1], **about),
    }
    return clock.compete(makers)


def sizes() -> str:
    """Parameters of both UNets, and what one forward pass of an image takes."""
    x, time = torch.zeros(1, *unet.SHAPE), torch.ones(1)
    ours = unet.trainer_of().net.eval()
    theirs = ddpm_peer.network(unet.SHAPE, num_parameters(ours)).eval()
    calls = {OURS: (ours, lambda: ours(x, time, None)), DDPM: (theirs, lambda: theirs(x, time))}
    about = {name: (num_parameters(net) / 1e6, _operations(call) / 1e9) for name, (net, call) in calls.items()}
    return "; ".join(f"{name} {million:.2f} M parameters, {giga:.2f} GFLOP" for name, (million, giga) in about.items())


def _operations(call: Step) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


PARTS: Final = {"conv VAE": conv_vae, "DCGAN": dcgan, "UNet": unet_training, "UNet's DDIM-10 of 16": unet_drawing}


def told(found: Mapping[str, Mapping[str, Timing]]) -> dict[str, Any]:
    """Medians and spread of a step in seconds, and what came of what was asked.

    Raises:
        RuntimeError: one of those that are compared could not run.
    """
    seconds: dict[str, dict[str, float]] = {}
    asked: list[dict[str, Any]] = []
    for part, timings in found.items():
        if failed := {name: timing.error for name, timing in timings.items() if timing.error}:
            raise RuntimeError(f"{part}: {failed}")
        for name, timing in timings.items():
            spread = {"median": timing.median, "least": min(timing.seconds), "most": max(timing.seconds)}
            seconds[f"{part} step, {name}"] = {figure: round(value, 5) for figure, value in spread.items()}
        if part not in GOALS:
            continue
        peer, bound = GOALS[part]
        value = timings[peer].median / timings[OURS].median
        figure = f"{part} training: times as fast as {peer}"
        asked.append({"figure": figure, "at least": bound, "value": round(value, 3), "reached": value >= bound})
    return {"asked": asked, "seconds": seconds}


def machine() -> dict[str, Any]:
    """Where this runs, and with what."""
    about = {"load": [round(load, 2) for load in os.getloadavg()], "python": platform.python_version()}
    return fingerprint(CPU) | about | {name: version(name) for name in (PYTHAE, DDPM)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--block-seconds", type=float, default=0.5, help="how long each runs in a round, at least")
    parser.add_argument("--output", type=Path, default=Path("bench/results/families/cpu.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    clock = Clock(device=CPU, rounds=options.rounds, block_seconds=options.block_seconds)
    report = {"machine": machine() | {"UNets": sizes()}, "rounds": options.rounds}
    report |= told({part: run(clock) for part, run in PARTS.items()})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
