"""Diffusion in the formulation of Karras et al. (2022), "EDM" (arXiv 2206.00364): network, loss, samplers.

Equation numbers are of that paper. Shape suffixes: B = batch, S = slots, C = channels, H, W = height and
width, R = rows of a solver's table, K = its columns.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from shared.specs.diffusion import DiffusionSpec, plan_of, steps_down
from shared.specs.noising import EDM_TIME
from shared.specs.tasks import MOST_RESTORING_STEPS, RESTORING_STEPS, Interpolate
from shared.specs.unet import UNETS
from worker.families.family import Batch, DataInfo, Draw, Family, Measured, Score, SlotState
from worker.families.nets.denoiser import Denoiser, Network, centred, num_classes_of, objective_of, spread
from worker.families.nets.diffusers_export import to_diffusers
from worker.families.nets.diffusers_import import from_diffusers
from worker.families.nets.dit import DITS, DiT
from worker.families.nets.latents import LatentDenoiser, space_of
from worker.families.nets.likelihood import bits_per_dim
from worker.families.nets.measurements import Projection, agreeing, averaged, enlarged, grey, in_range, kept, reduced
from worker.families.nets.nonleaky import NUM_TOLD, augmented
from worker.families.nets.slerp import slerp
from worker.families.nets.solvers import COLUMNS, averaging, ddpm, heun, num_evaluations, table_of
from worker.families.nets.solving import (
    FIRST,
    LEVEL,
    UNLABELLED,
    FromImages,
    FromNoise,
    Solve,
    inputs_of,
)
from worker.families.nets.unet import UNet
from worker.kernels.noise import Noise

PATCH_SIZE: Final = 4
"""Pixels of a token's side, unless the spec says how many; of latents one cell."""
MOST_SCORED: Final = 128
"""Images whose likelihood is computed: each costs about as much as drawing ten."""
ENCODING_STEPS: Final = 50
"""Of Heun's method, each way."""
DEVIATION: Final = 0.5
"""Of the pixels of images in [-1, 1], about (EDM's sigma_data)."""


# Network -----------------------------------------------------------------------------------------


def build(spec: DiffusionSpec, data: DataInfo) -> Denoiser:
    """A denoiser of images of ``data.shape``, or of their latents."""
    num_classes = num_classes_of(spec, data)
    if spec.autoencoder is None:
        return Denoiser(network_of(spec, data), objective_of(spec), num_classes)
    autoencoder = data.models["autoencoder"].network()
    deviation = spec.sigma_data if spec.objective == "edm" else 1.0
    return LatentDenoiser(network_of(spec, data), objective_of(spec), num_classes, autoencoder, deviation)


def network_of(spec: DiffusionSpec, data: DataInfo) -> Network:
    """F, as large as what it sees. A latent without places is one token of the transformer, which is then a residual
    network of SwiGLUs."""
    shape_CHW, rest = space_of(spec, data), (num_classes_of(spec, data), spec.dropout)
    is_latent, has_places = spec.autoencoder is not None, shape_CHW[1:] != (1, 1)
    if spec.network == "unet" and (has_places or not is_latent):
        layout = UNETS[spec.preset]
        network = UNet(replace(layout, patch_size=1) if is_latent else layout, shape_CHW[0], *rest)
    else:
        network = DiT(DITS[spec.preset], spec.patch_size or (1 if is_latent else PATCH_SIZE), shape_CHW, *rest)
    network.time_scale = EDM_TIME if spec.objective == "edm" else 1.0
    if spec.augment:
        network.learn_augmentation(NUM_TOLD)
    return network


# Loss --------------------------------------------------------------------------------------------


def shown_labels(spec: DiffusionSpec, net: Denoiser, batch: Batch, noise: Noise) -> Tensor:
    """The classes that the network is told; ``label_dropout`` of them are none."""
    if not net.num_classes:
        return torch.zeros_like(noise.index_B)
    is_hidden_B = noise.uniform(stream=UNLABELLED) < spec.label_dropout
    return torch.where(is_hidden_B, net.num_classes, batch["label"])


def loss(spec: DiffusionSpec, net: Denoiser, batch: Batch, noise: Noise) -> Measured:
    """Mean square distance of F from what makes D exact, at random noise levels (equation 8, weight 1 / c_out^2)."""
    x0_BCHW, told_BA = augmented(net.encode(batch["image"]), noise, spec.augment if net.training else 0.0)
    sigma_B = net.objective.levels(noise, LEVEL)
    x_BCHW = x0_BCHW + spread(sigma_B) * noise.normal(*x0_BCHW.shape[1:], stream=FIRST)
    scales = net.objective.scales(sigma_B)
    target_BCHW = (x0_BCHW - spread(scales.c_skip) * x_BCHW) / spread(scales.c_out)
    label_B = shown_labels(spec, net, batch, noise)
    with net.network.dropout.drawing(noise if net.training else None), net.network.told(told_BA):
        raw_BCHW = net.raw(x_BCHW, sigma_B, label_B)
    distance_BCHW = (raw_BCHW - target_BCHW.float()) ** 2
    error_BCHW = distance_BCHW.detach() * spread(scales.c_out.float()) ** 2
    return Measured(loss=distance_BCHW.mean(), values={"denoising_error": error_BCHW.mean()})


# Samplers ----------------------------------------------------------------------------------------


class AlongPaths(FromNoise):
    """Solves down from points between pairs of noises; the ends of pair ``p`` are those of samples 2p and 2p + 1.

    Samples of one path have one class: ``labels`` are of pairs.
    """

    def first(self, draws: Sequence[Draw[Interpolate]], noise: Noise) -> Tensor:
        pairs, points = zip(*(divmod(draw.index, draw.request.num_points) for draw in draws), strict=True)
        last_points = [draw.request.num_points - 1 for draw in draws]
        t_S = torch.tensor(points, device=noise.device) / torch.tensor(last_points, device=noise.device)
        ends = [[2 * pair for pair in pairs], [2 * pair + 1 for pair in pairs]]
        a_SX, b_SX = (noise.at(end).normal(*self.shape_CHW, stream=FIRST).flatten(1) for end in ends)
        return slerp(a_SX, b_SX, t_S[:, None]).unflatten(1, self.shape_CHW)

    def label_of(self, draw: Draw[Interpolate]) -> int:
        pair = draw.index // draw.request.num_points
        return super().label_of(Draw(request=draw.request, index=pair))


class ThereAndBack(FromImages):
    """Encodes an image to noise by the ordinary differential equation, and solves back down to an image.

    The class is not told, so that the noise holds all that is known of the image.
    """

    num_rows = 2 * num_evaluations("heun", ENCODING_STEPS)

    def num_steps(self, request: Any) -> int:
        return len(self.table())

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        nothing_SCHW = torch.zeros(len(draws), *self.shape_CHW, dtype=torch.float64, device=noise.device)
        is_seen_S = torch.ones(len(draws), dtype=torch.bool, device=noise.device)
        return self.start_at(draws, nothing_SCHW, [self.table()] * len(draws), is_seen_S=is_seen_S)

    def table(self) -> Tensor:
        """The rows up and down."""
        return torch.cat((self.up(), heun(self.levels(ENCODING_STEPS))))

    def up(self) -> Tensor:
        """The rows up, from the lowest noise level that is not zero."""
        return heun(self.levels(ENCODING_STEPS)[:-1].flip(0))

    def label_of(self, draw: Draw[Any]) -> int:
        return self.num_classes


class ToNoise(ThereAndBack):
    """Encodes an image to noise: a draw of N(0, I) as far as the model knows such images."""

    num_rows = num_evaluations("heun", ENCODING_STEPS)

    def table(self) -> Tensor:
        return self.up()

    def finish(self, net: Denoiser, state: SlotState) -> Tensor:
        """float32 ``(S, C, H, W)``, in the model's space."""
        return (state["x"] / self.objective.sigma_max).float()


class Edit(Solve):
    """What tasks on images share: no class is told unless one is asked for."""

    def label_of(self, draw: Draw[Any]) -> int:
        return super().label_of(draw) if draw.request.labels else self.num_classes

    def num_steps(self, request: Any) -> int:
        return len(self.table(request))

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        tables = [self.table(draw.request) for draw in draws]
        return self.state(self.first(tables, noise), tables, draws)

    def first(self, tables: Sequence[Tensor], noise: Noise) -> Tensor:
        """Noise of the level that each table begins at."""
        first_S = torch.stack([table_RK[0, COLUMNS.index("sigma")] for table_RK in tables]).to(noise.device)
        return spread(first_S) * noise.normal(*self.shape_CHW, stream=FIRST).double()

    def table(self, request: Any) -> Tensor:
        """The rows ``(R, K)``, from the noise level that the task begins at."""
        raise NotImplementedError


class Restore(Edit):
    """Completes images of which something was measured: ``known`` in the state, ``A+ y`` (``nets.measurements``).

    What is missing in an estimate pulls at the noisy image through the network, and so at the pixels that were not
    measured (pseudoinverse guidance, Song et al., 2023, algorithm 1); then the estimate is made to agree.
    """

    num_rows = MOST_RESTORING_STEPS

    def table(self, request: Any) -> Tensor:
        levels_N = self.levels(request.steps or RESTORING_STEPS, request.schedule)
        return averaging(ddpm(levels_N), request.average_of)

    def projection(self, state: SlotState) -> Projection:
        """``A+ A`` of every slot."""
        raise NotImplementedError

    def estimate(self, net: Denoiser, state: SlotState, sigma_S: Tensor) -> Tensor:
        projection = self.projection(state)
        with torch.enable_grad():
            x_SCHW = state["x"].detach().requires_grad_()
            estimate_SCHW = super().estimate(net, state | {"x": x_SCHW}, sigma_S)
            missing_SCHW = (state["known"] - projection(estimate_SCHW)).detach()
            (pull_SCHW,) = torch.autograd.grad(estimate_SCHW, x_SCHW, missing_SCHW)
        # sigma^2 over the variance of the clean image given the noisy one, were its pixels independent.
        strength_S = 1 + (sigma_S / DEVIATION) ** 2
        guided_SCHW = (estimate_SCHW.detach() + spread(strength_S) * pull_SCHW).clamp(-1, 1)
        return agreeing(guided_SCHW, state["known"], projection)


class Inpaint(Restore):
    """Fills what a mask covers; the rest of each image stays as it is, to the bit."""

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        mask_S1HW = inputs_of(draws, "mask", noise.device)
        known_SCHW = kept(mask_S1HW)(centred(inputs_of(draws, "image", noise.device)))
        return super().start(draws, noise) | {"mask": mask_S1HW, "known": known_SCHW}

    def projection(self, state: SlotState) -> Projection:
        return kept(state["mask"])


class RestoreMeans(Restore):
    """Completes images of which means were measured; the bytes of the result have them, too, where the network would
    leave their range."""

    def finish(self, net: Denoiser, state: SlotState) -> Tensor:
        return net.decode(in_range(state["x"], state["known"], self.projection(state)))

    def look(self, net: Denoiser, state: SlotState) -> Tensor:
        return net.decode(in_range(state["estimate"], state["known"], self.projection(state)))


class SuperResolve(RestoreMeans):
    """Enlarges images; squares of the result have the mean that the input's pixel has."""

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        factors = [draw.request.factor for draw in draws]
        given = zip(centred(inputs_of(draws, "image", noise.device)).split(1), factors, strict=True)
        known_SCHW = torch.cat([self.known(image_1CHW, factor) for image_1CHW, factor in given])
        return super().start(draws, noise) | {"known": known_SCHW, "factor": torch.tensor(factors).to(noise.device)}

    def known(self, image_1CHW: Tensor, factor: int) -> Tensor:
        """A small image enlarged, or one of the model's own size reduced first."""
        is_large = tuple(image_1CHW.shape[1:]) == self.shape_CHW
        return enlarged(reduced(image_1CHW, factor) if is_large else image_1CHW, factor)

    def projection(self, state: SlotState) -> Projection:
        def project(image_SCHW: Tensor) -> Tensor:
            for factor in state["factor"].unique().tolist():
                image_SCHW = torch.where(spread(state["factor"] == factor), averaged(factor)(image_SCHW), image_SCHW)
            return image_SCHW

        return project


class Colourise(RestoreMeans):
    """Gives colours to images; the mean of the result's channels is that of the input's."""

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        given_SCHW = centred(inputs_of(draws, "image", noise.device))
        return super().start(draws, noise) | {"known": grey(given_SCHW.expand(-1, self.shape_CHW[0], -1, -1))}

    def projection(self, state: SlotState) -> Projection:
        return grey


class ImageToImage(FromImages, Edit):
    """Adds noise to an image and solves back down, from a level that ``strength`` says (SDEdit, Meng et al., 2021); 1
    begins at noise alone, as ``FromNoise`` does."""

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        tables = [self.table(draw.request) for draw in draws]
        is_seen_S = torch.tensor([draw.request.strength < 1 for draw in draws], device=noise.device)
        whole_SCHW = noise.normal(*self.shape_CHW, stream=FIRST).double() * self.objective.sigma_max
        first_SCHW = torch.where(spread(is_seen_S), self.first(tables, noise), whole_SCHW)
        return self.start_at(draws, first_SCHW, tables, is_seen_S=is_seen_S)

    def table(self, request: Any) -> Tensor:
        solver, steps = plan_of(request)
        return table_of(solver, self.levels(steps, request.schedule)[steps - steps_down(request) :])


FAMILY: Final = Family(
    spec=DiffusionSpec,
    build=build,
    losses={"denoiser": loss},
    tasks={
        "generate": FromNoise,
        "interpolate": AlongPaths,
        "reconstruct": ThereAndBack,
        "encode": ToNoise,
        "inpaint": Inpaint,
        "super_resolve": SuperResolve,
        "colourise": Colourise,
        "image_to_image": ImageToImage,
    },
    scores={"bits_per_dim": Score(values=bits_per_dim, most=MOST_SCORED)},
    exports={"diffusers": to_diffusers},
    imports={"diffusers": from_diffusers},
)
