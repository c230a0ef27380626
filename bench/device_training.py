"""The training parts of ``bench/device.py``: a UNet, a diffusion transformer, a DCGAN."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bench.device_parts import Bench, captured_checks, counted, images_of, stepping
from bench.kernels import check
from bench.timing import Maker, Step
from bench.usual import DEFAULT, TUNED, USUAL, Manner, Ours, dcgan, predictor, training, unzeroed
from shared.specs.diffusion import DiffusionSpec
from shared.specs.gan import GanSpec
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.families.nets import unet
from worker.kernels.dispatch import group_norm_silu
from worker.kernels.group_norm import Norm

ENGINE = "engine"
DATASET = "ds_" + "0" * 32
"""Of no dataset: specs must name one."""
CAPTURED_TO = 32
"""The largest batch at which steps are captured as well: larger ones do not wait for launches."""
COMPILED_AT = (32, 128)
"""Batches at which the network that is tuned by hand is compiled: for each it takes most of a minute."""


def unet_training(bench: Bench) -> None:
    """UNet-b on 32 x 32 pixels: a step of the engine against scripts, at small batches and large ones."""
    preset, shape = ("xs", (3, 8, 8)) if bench.is_tiny else ("b", (3, 32, 32))
    spec = DiffusionSpec.model_validate(
        {"family": "diffusion", "dataset": DATASET, "model": "bench", "preset": preset, "objective": "eps"}
    )
    data = DataInfo(shape=shape)
    of_sample = counted(spec, data, bench.device)
    whose, _ = predictor(preset, shape)
    for batch in (2,) if bench.is_tiny else (128, 8, 512, 32):
        images = images_of(batch, shape, bench.device)
        centred = images.float() / 127.5 - 1
        sized = spec.model_copy(update={"batch_size": batch})

        def by_script(manner: Manner, x: Tensor = centred) -> Step:
            return training(predictor(preset, shape)[1], x, manner)

        def by_engine(sized: DiffusionSpec = sized, images: Tensor = images) -> Step:
            return stepping(sized, data, {"image": images}, bench.device)

        def with_kernel(make: Maker = by_engine) -> Step:
            return _with_fused_norm(make())

        compiles = bench.compiles and batch in COMPILED_AT
        makers: dict[str, Maker] = {
            f"{whose}, {DEFAULT}": lambda: by_script(USUAL),
            f"{whose}, {TUNED}{' (compiled)' if compiles else ''}": lambda compiles=compiles: by_script(
                Manner(is_tuned=True, compiles=compiles)
            ),
            ENGINE: by_engine,
            f"{ENGINE}, fused norm": with_kernel,
        }
        if batch <= CAPTURED_TO:
            given = sized.model_copy(update={"captured": True}), data, {"image": images}, bench.device
            check(bench, "unet training", f"B={batch}, captured", lambda given=given: captured_checks(*given))
            makers[f"{ENGINE}, captured"] = lambda given=given: stepping(*given)
        bench.record("unet training", f"B={batch}", bench.clock.compete(makers), of_sample.training(batch))


def _with_fused_norm(step: Step) -> Step:
    """The step with ``worker.kernels.group_norm`` wherever the network normalises and then applies SiLU."""

    def fused() -> None:
        with _fused_norm():
            step()

    return fused


@contextmanager
def _fused_norm() -> Iterator[None]:
    usual: Any = unet.normalised

    def normalised(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, *, silu: bool) -> Tensor:
        if not silu:
            return usual(norm, x, shift, silu=silu)
        x = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
        return group_norm_silu(x, Norm(norm.weight, norm.bias, norm.num_groups, norm.eps))

    unet.normalised = normalised
    try:
        yield
    finally:
        unet.normalised = usual


def dit_training(bench: Bench) -> None:
    """DiT-B/2 on 32 x 32 latents of four channels, which are 256 tokens: its share of the matrix rate."""
    preset, patch, batch = ("xs", 4, 2) if bench.is_tiny else ("b", 2, 256)
    shape = (4, 8, 8) if bench.is_tiny else (4, 32, 32)
    fields = {"network": "dit", "preset": preset, "patch_size": patch, "batch_size": batch, "objective": "flow"}
    spec = DiffusionSpec.model_validate({"family": "diffusion", "dataset": DATASET, "model": "bench", **fields})
    data = DataInfo(shape=shape)
    images = images_of(batch, shape, bench.device)
    centred = images.float() / 127.5 - 1

    def by_script(manner: Manner) -> Step:
        net = build(FAMILIES["diffusion"], spec, data).network
        return training(Ours(unzeroed(net)), centred, manner)

    makers: dict[str, Maker] = {
        f"our network, {TUNED}": lambda: by_script(Manner(is_tuned=True)),
        f"our network, {TUNED} (compiled)": lambda: by_script(Manner(is_tuned=True, compiles=True)),
        ENGINE: lambda: stepping(spec, data, {"image": images}, bench.device),
    }
    if not bench.compiles:
        del makers[f"our network, {TUNED} (compiled)"]
    work = counted(spec, data, bench.device).training(batch)
    bench.record("DiT training", f"{preset}, B={batch}", bench.clock.compete(makers), work)


def gan_training(bench: Bench) -> None:
    """A step of both networks of a DCGAN for 64 x 64 pixels, at the batch where launches are what it waits for."""
    batch, base, latent_dim = (2, 4, 8) if bench.is_tiny else (64, 64, 100)
    images = images_of(batch, (3, 64, 64), bench.device)
    fields = {"network": "dcgan", "base_channels": base, "latent_dim": latent_dim, "batch_size": batch}
    spec = GanSpec.model_validate({"family": "gan", "dataset": DATASET, "model": "bench", **fields})
    about = DataInfo(shape=(3, 64, 64)), {"image": images}, bench.device
    makers: dict[str, Maker] = {
        f"plain PyTorch, {DEFAULT}": lambda: dcgan(images.float() / 127.5 - 1, latent_dim, base)[0],
        ENGINE: lambda: stepping(spec, *about),
        f"{ENGINE}, captured": lambda: stepping(spec.model_copy(update={"captured": True}), *about),
    }
    check(bench, "DCGAN training", f"B={batch}, captured", lambda: captured_checks(spec, *about))
    bench.record("DCGAN training", f"B={batch}", bench.clock.compete(makers), {})
