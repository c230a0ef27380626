"""Diffusion in the formulation of Karras et al. (2022), "EDM" (arXiv 2206.00364): network, loss, samplers.

Equation numbers are of that paper. Shape suffixes: B = batch, S = slots, C = channels, H, W = height and
width, R = rows of a solver's table, K = its columns.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from shared.specs.diffusion import DiffusionSpec
from shared.specs.tasks import Generate, Interpolate, Reconstruct, Sampling, Solver
from worker.families.family import Batch, DataInfo, Draw, Family, Measured, SlotState
from worker.families.nets.dit import DITS, DiT
from worker.families.nets.measurements import agreeing, averaged, enlarged, grey, kept, reduced
from worker.families.nets.preconditioning import Edm, Flow, VariancePreserving
from worker.families.nets.slerp import slerp
from worker.families.nets.solvers import COLUMNS, heun, karras, num_evaluations, padded, table_of, travelling
from worker.families.nets.unet import UNETS, UNet
from worker.kernels.noise import Noise

FIRST, FRESH, UNLABELLED, LEVEL = range(4)
"""Streams of noise: the image's (in a sampler: the first one), a step's own, and what only training draws."""
DEFAULT_SOLVER: Final[Solver] = "heun"
DEFAULT_STEPS: Final[dict[Solver, int]] = {"euler": 50, "heun": 18, "ddim": 50, "ddpm": 250, "dpmpp_2m": 20}
ENCODING_STEPS: Final = 50
"""Of Heun's method, each way."""
MOST_STEPS: Final = 1000
RESTORING_STEPS: Final = 50
RESTORING_ETA: Final = 0.85
LENGTH, LAPS = 5, 2
"""Steps of each stretch that a restoration goes through again, and how often it does."""
EVERYWHERE: Final = (0.0, float("inf"))


# Network -----------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """D(x; sigma): the best guess of the clean image inside a noisy one (equation 7)."""

    def __init__(self, network: UNet | DiT, objective: Edm | Flow | VariancePreserving, num_classes: int) -> None:
        super().__init__()
        self.network, self.objective, self.num_classes = network, objective, num_classes

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        """The clean image, float64 as ``x`` and ``sigma`` are; class ``num_classes`` stands for none."""
        scales = self.objective.scales(sigma_B)
        raw_BCHW = self.raw(x_BCHW, sigma_B, label_B)
        return spread(scales.c_skip) * x_BCHW + spread(scales.c_out) * raw_BCHW

    def raw(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        """F of equation 7, in float32."""
        scales = self.objective.scales(sigma_B)
        return self.network((spread(scales.c_in) * x_BCHW).float(), scales.c_noise.float(), label_B)


def spread(values_B: Tensor) -> Tensor:
    """A number per image as ``(B, 1, 1, 1)``."""
    return values_B[:, None, None, None]


def objective_of(spec: DiffusionSpec) -> Edm | Flow | VariancePreserving:
    """What the network predicts."""
    given = {"mean": spec.noise_mean, "std": spec.noise_std}
    levels = {name: value for name, value in given.items() if value is not None}
    match spec.objective:
        case "edm":
            return Edm(spec.sigma_data, **levels)
        case "flow":
            return Flow(**levels)
        case prediction:
            return VariancePreserving(prediction)


def num_classes_of(spec: DiffusionSpec, data: DataInfo) -> int:
    """Classes that the network knows."""
    return data.num_classes if spec.class_conditional else 0


def build(spec: DiffusionSpec, data: DataInfo) -> Denoiser:
    """A denoiser of images of ``data.shape``."""
    num_classes = num_classes_of(spec, data)
    if spec.network == "unet":
        network = UNet(UNETS[spec.preset], data.shape[0], num_classes, spec.dropout)
    else:
        network = DiT(DITS[spec.preset], spec.patch_size, data.shape, num_classes, spec.dropout)
    return Denoiser(network, objective_of(spec), num_classes)


# Loss --------------------------------------------------------------------------------------------


def centred(image_BCHW: Tensor) -> Tensor:
    """Bytes as float64 in [-1, 1]."""
    return image_BCHW.double() / 127.5 - 1


def shown_labels(spec: DiffusionSpec, net: Denoiser, batch: Batch, noise: Noise) -> Tensor:
    """The classes that the network is told; ``label_dropout`` of them are none."""
    if not net.num_classes:
        return torch.zeros_like(noise.index_B)
    is_hidden_B = noise.uniform(stream=UNLABELLED) < spec.label_dropout
    return torch.where(is_hidden_B, net.num_classes, batch["label"])


def loss(spec: DiffusionSpec, net: Denoiser, batch: Batch, noise: Noise) -> Measured:
    """Mean square distance of F from what makes D exact, at random noise levels (equation 8, weight 1 / c_out^2)."""
    x0_BCHW = centred(batch["image"])
    sigma_B = net.objective.levels(noise, LEVEL)
    x_BCHW = x0_BCHW + spread(sigma_B) * noise.normal(*x0_BCHW.shape[1:], stream=FIRST)
    scales = net.objective.scales(sigma_B)
    target_BCHW = (x0_BCHW - spread(scales.c_skip) * x_BCHW) / spread(scales.c_out)
    label_B = shown_labels(spec, net, batch, noise)
    with net.network.dropout.drawing(noise if net.training else None):
        raw_BCHW = net.raw(x_BCHW, sigma_B, label_B)
    distance_BCHW = (raw_BCHW - target_BCHW.float()) ** 2
    error_BCHW = distance_BCHW.detach() * spread(scales.c_out.float()) ** 2
    return Measured(loss=distance_BCHW.mean(), values={"denoising_error": error_BCHW.mean()})


# Samplers ----------------------------------------------------------------------------------------


class Solve:
    """What all samplers share: each slot follows its own table (``worker.families.nets.solvers``).

    One step is one evaluation of the network for every slot. Images are float64 in the state, as rounding errors
    would add up over a thousand steps; the network sees float32.
    """

    num_rows: int = num_evaluations("heun", MOST_STEPS)
    """Of the tables of all slots, whatever they were asked for."""

    def __init__(self, spec: DiffusionSpec, data: DataInfo) -> None:
        self.shape_CHW, self.num_classes = data.shape, num_classes_of(spec, data)
        self.objective = objective_of(spec)

    def state(self, x_SCHW: Tensor, tables: Sequence[Tensor], draws: Sequence[Draw[Any]]) -> SlotState:
        """Slots at the beginning of their tables."""
        device = x_SCHW.device
        options = [guidance_of(draw.request) for draw in draws]
        return {
            "x": x_SCHW,
            "memory": torch.zeros_like(x_SCHW),
            "table": torch.stack([padded(table_RK, self.num_rows) for table_RK in tables]).to(device),
            "label": torch.tensor([self.label_of(draw) for draw in draws], device=device),
            "guidance": torch.tensor(options, dtype=torch.float64, device=device),
        }

    def label_of(self, draw: Draw[Any]) -> int:
        """The class asked for, or the next in turn."""
        if not self.num_classes:
            return 0
        labels = draw.request.labels or range(self.num_classes)
        return labels[draw.index % len(labels)]

    def levels(self, steps: int) -> Tensor:
        """Noise levels between which the model was trained."""
        return karras(steps, self.objective.sigma_min, self.objective.sigma_max)

    def step(self, net: Denoiser, state: SlotState, noise: Noise) -> SlotState:
        """Evaluate the network once, for slots that are each at their own row."""
        row_S = noise.step_B.clamp(max=self.num_rows - 1)
        here_SK = state["table"][torch.arange(len(row_S), device=row_S.device), row_S]
        at = dict(zip(COLUMNS, here_SK.unbind(1), strict=True))
        x_SCHW, memory_SCHW = state["x"], state["memory"]
        estimate_SCHW = self.estimate(net, state, at["sigma"])
        # Not in place and never by addcmul: with one rounding less, some slots would differ in the last bit.
        next_SCHW = (
            spread(at["x_from_x"]) * x_SCHW
            + spread(at["x_from_D"]) * estimate_SCHW
            + spread(at["x_from_m"]) * memory_SCHW
        )
        if at["x_from_n"].any():
            fresh_SCHW = spread(at["x_from_n"]) * noise.normal(*self.shape_CHW, stream=FRESH).double()
            next_SCHW = torch.where(spread(at["x_from_n"]) > 0, next_SCHW + fresh_SCHW, next_SCHW)
        memory_SCHW = spread(at["m_from_x"]) * x_SCHW + spread(at["m_from_D"]) * estimate_SCHW
        return {"x": next_SCHW, "memory": memory_SCHW}

    def estimate(self, net: Denoiser, state: SlotState, sigma_S: Tensor) -> Tensor:
        """D(x; sigma) of every slot, guided where its request asks for it at this noise level.

        Whatever a sample is known to satisfy is put into this estimate, here and nowhere else.
        """
        estimate_SCHW = net(state["x"], sigma_S, state["label"])
        scale_S, low_S, high_S = state["guidance"].unbind(1)
        is_guided_S = (scale_S != 1) & (sigma_S > low_S) & (sigma_S <= high_S)
        if not is_guided_S.any():
            return estimate_SCHW
        # All slots once more, as the shape decides about the bits; those that are not guided ignore it.
        unlabelled_SCHW = net(state["x"], sigma_S, torch.full_like(state["label"], net.num_classes))
        guided_SCHW = unlabelled_SCHW + spread(scale_S) * (estimate_SCHW - unlabelled_SCHW)
        return torch.where(spread(is_guided_S), guided_SCHW, estimate_SCHW)

    def finish(self, state: SlotState) -> Tensor:
        return ((state["x"].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def guidance_of(request: Sampling) -> tuple[float, float, float]:
    """Scale of guidance, and the noise levels above and up to which it acts."""
    return request.guidance_scale, *(request.guidance_interval or EVERYWHERE)


def plan_of(request: Sampling) -> tuple[Solver, int]:
    """The solver and its number of steps."""
    solver = request.solver or DEFAULT_SOLVER
    return solver, request.steps or DEFAULT_STEPS[solver]


class FromNoise(Solve):
    """Draws noise and solves down to an image."""

    def num_steps(self, request: Generate | Interpolate) -> int:
        return num_evaluations(*plan_of(request))

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        x_SCHW = self.first(draws, noise).double() * self.objective.sigma_max
        return self.state(x_SCHW, [self.table(draw.request) for draw in draws], draws)

    def first(self, draws: Sequence[Draw[Any]], noise: Noise) -> Tensor:
        """Standard normal noise, one image for each draw."""
        return noise.normal(*self.shape_CHW, stream=FIRST)

    def table(self, request: Generate | Interpolate) -> Tensor:
        """The rows ``(R, K)`` from noise to an image."""
        solver, steps = plan_of(request)
        eta = request.eta if isinstance(request, Generate) else 0.0
        return table_of(solver, self.levels(steps), eta)


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


class ThereAndBack(Solve):
    """Encodes an image to noise by the ordinary differential equation, and solves back down to an image.

    The class is not told, so that the noise holds all that is known of the image.
    """

    num_rows = 2 * num_evaluations("heun", ENCODING_STEPS)

    def num_steps(self, request: Reconstruct) -> int:
        return len(self.table())

    def start(self, draws: Sequence[Draw[Reconstruct]], noise: Noise) -> SlotState:
        x_SCHW = centred(inputs_of(draws, "image", noise))
        return self.state(x_SCHW, [self.table()] * len(draws), draws)

    def table(self) -> Tensor:
        """The rows up, from the lowest noise level that is not zero, and down."""
        down_N = self.levels(ENCODING_STEPS)
        return torch.cat((heun(down_N[:-1].flip(0)), heun(down_N)))

    def label_of(self, draw: Draw[Reconstruct]) -> int:
        return self.num_classes


class Edit(Solve):
    """What tasks on images share: no class is told unless one is asked for."""

    def label_of(self, draw: Draw[Any]) -> int:
        return super().label_of(draw) if draw.request.labels else self.num_classes

    def num_steps(self, request: Any) -> int:
        return len(self.table(request))

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        tables = [self.table(draw.request) for draw in draws]
        first_S = torch.stack([table_RK[0, COLUMNS.index("sigma")] for table_RK in tables]).to(noise.device)
        noise_SCHW = spread(first_S) * noise.normal(*self.shape_CHW, stream=FIRST).double()
        return self.state(noise_SCHW, tables, draws)

    def table(self, request: Any) -> Tensor:
        """The rows ``(R, K)``, from the noise level that the task begins at."""
        steps = request.steps or RESTORING_STEPS
        return travelling(self.levels(steps), RESTORING_ETA, LENGTH, LAPS)


class Inpaint(Edit):
    """Fills what a mask covers; the rest of each image stays as it is, to the bit."""

    num_rows = LAPS * MOST_STEPS

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        mask_S1HW = inputs_of(draws, "mask", noise)
        known_SCHW = kept(mask_S1HW)(centred(inputs_of(draws, "image", noise)))
        return super().start(draws, noise) | {"mask": mask_S1HW, "known": known_SCHW}

    def estimate(self, net: Denoiser, state: SlotState, sigma_S: Tensor) -> Tensor:
        return agreeing(super().estimate(net, state, sigma_S), state["known"], kept(state["mask"]))


class SuperResolve(Edit):
    """Enlarges images; squares of the result have the mean that the input's pixel has."""

    num_rows = LAPS * MOST_STEPS

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        factors = [draw.request.factor for draw in draws]
        given = zip(centred(inputs_of(draws, "image", noise)).split(1), factors, strict=True)
        known_SCHW = torch.cat([self.known(image_1CHW, factor) for image_1CHW, factor in given])
        return super().start(draws, noise) | {"known": known_SCHW, "factor": torch.tensor(factors).to(noise.device)}

    def known(self, image_1CHW: Tensor, factor: int) -> Tensor:
        """A small image enlarged, or one of the model's own size reduced first."""
        is_large = tuple(image_1CHW.shape[1:]) == self.shape_CHW
        return enlarged(reduced(image_1CHW, factor) if is_large else image_1CHW, factor)

    def estimate(self, net: Denoiser, state: SlotState, sigma_S: Tensor) -> Tensor:
        estimate_SCHW = super().estimate(net, state, sigma_S)
        for factor in state["factor"].unique().tolist():
            agreeing_SCHW = agreeing(estimate_SCHW, state["known"], averaged(factor))
            estimate_SCHW = torch.where(spread(state["factor"] == factor), agreeing_SCHW, estimate_SCHW)
        return estimate_SCHW


class Colourise(Edit):
    """Gives colours to images; the mean of the result's channels is that of the input's."""

    num_rows = LAPS * MOST_STEPS

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        given_SCHW = centred(inputs_of(draws, "image", noise))
        return super().start(draws, noise) | {"known": grey(given_SCHW.expand(-1, self.shape_CHW[0], -1, -1))}

    def estimate(self, net: Denoiser, state: SlotState, sigma_S: Tensor) -> Tensor:
        return agreeing(super().estimate(net, state, sigma_S), state["known"], grey)


class ImageToImage(Edit):
    """Adds noise to an image and solves back down, from a level that ``strength`` says (SDEdit, Meng et al., 2021)."""

    def start(self, draws: Sequence[Draw[Any]], noise: Noise) -> SlotState:
        state = super().start(draws, noise)
        return state | {"x": state["x"] + centred(inputs_of(draws, "image", noise))}

    def table(self, request: Any) -> Tensor:
        solver, steps = plan_of(request)
        num_kept = max(1, round(steps * request.strength))
        return table_of(solver, self.levels(steps)[steps - num_kept :])


def inputs_of(draws: Sequence[Draw[Any]], name: str, noise: Noise) -> Tensor:
    """One of the draws' inputs, with a slot axis."""
    return torch.stack([draw.inputs[name] for draw in draws if draw.inputs is not None]).to(noise.device)


FAMILY: Final = Family(
    spec=DiffusionSpec,
    build=build,
    losses={"denoiser": loss},
    tasks={
        "generate": FromNoise,
        "interpolate": AlongPaths,
        "reconstruct": ThereAndBack,
        "inpaint": Inpaint,
        "super_resolve": SuperResolve,
        "colourise": Colourise,
        "image_to_image": ImageToImage,
    },
)
