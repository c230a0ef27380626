"""The peers of the other families compute what ours do, and what is told of a comparison follows from its times."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import families
from bench.device_parts import images_of, trainer_of
from bench.families import OURS, SCRIPT, told
from bench.family_peers import (
    PYTHAE,
    beginning_with,
    gan_discriminator,
    gan_generator,
    tutorial_step,
    vae_decoder,
    vae_encoder,
)
from bench.timing import Clock, Timing
from shared.specs import GanSpec, VaeSpec
from worker.families.family import DataInfo
from worker.families.vae import grey_levels

CPU = torch.device("cpu")
SHAPE = (1, 28, 28)
IMAGES = images_of(4, SHAPE, CPU)
FIELDS = {"base_channels": 16, "latent_dim": 8, "dataset": "ds_" + "0" * 32, "model": "bench"}
LATENTS = torch.linspace(-1, 1, 32).view(4, 8)


def net_of(spec: Any) -> Any:
    return trainer_of(spec, DataInfo(shape=SHAPE), CPU).net.train()


def test_pythaes_vae_has_our_networks():
    net = net_of(VaeSpec.model_validate({"family": "vae", **FIELDS}))

    encoder = beginning_with(net.encoder.parameters(), vae_encoder(16, 8))
    decoder = beginning_with(net.decoder.parameters(), vae_decoder(16, 8))

    torch.testing.assert_close(encoder(grey_levels(IMAGES)), torch.cat(net.encode(grey_levels(IMAGES)), dim=1))
    torch.testing.assert_close(decoder(LATENTS), net.decode(LATENTS))


def test_the_script_has_our_gan():
    net = net_of(GanSpec.model_validate({"family": "gan", "network": "dcgan", **FIELDS}))

    generator = beginning_with(net.generator.parameters(), gan_generator(16, 8))
    discriminator = beginning_with(net.discriminator.parameters(), gan_discriminator(16))

    fakes: Tensor = net.generator(LATENTS, None)
    torch.testing.assert_close(generator(LATENTS), fakes)
    # In float32 here, though in bf16 elsewhere: nothing is autocast.
    torch.testing.assert_close(discriminator(fakes), net.discriminator(fakes, None).sigmoid())


def test_a_step_of_the_script_trains_both_networks():
    nets: list[nn.Module] = [gan_generator(4, 8), gan_discriminator(4)]
    before = [[weight.detach().clone() for weight in net.parameters()] for net in nets]

    tutorial_step(nets[0], nets[1], IMAGES, 8)()

    for net, weights in zip(nets, before, strict=True):
        assert all(not torch.equal(now, then) for now, then in zip(net.parameters(), weights, strict=True))


def test_gans_are_compared_step_by_step():
    timings = families.dcgan(Clock(device=CPU, rounds=1, block_seconds=0))

    assert {name: timing.error for name, timing in timings.items() if timing.error} == {}
    assert all(timing.median > 0 for timing in timings.values())


def test_what_was_asked_is_the_ratio_of_medians():
    found = {
        "conv VAE": {OURS: Timing(seconds=[1.0, 2.0, 9.0]), PYTHAE: Timing(seconds=[5.0, 7.0, 6.0])},
        "DCGAN": {OURS: Timing(seconds=[1.0]), SCRIPT: Timing(seconds=[1.25])},
    }

    report = told(found)

    assert [(one["at least"], one["value"], one["reached"]) for one in report["asked"]] == [
        (3.0, 3.0, True),
        (1.5, 1.25, False),
    ]
    assert report["seconds"]["conv VAE step, pythae"] == {"median": 6.0, "least": 5.0, "most": 7.0}


def test_nothing_is_told_of_a_comparison_that_lacks_a_side():
    broken = Timing(error="ImportError: no pythae")

    with pytest.raises(RuntimeError, match="no pythae"):
        told({"conv VAE": {OURS: Timing(seconds=[1.0]), PYTHAE: broken}})
