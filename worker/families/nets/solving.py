"""Samplers of a denoiser: each slot follows its own table, from noise to an image.

Shape suffixes: S = slots, C = channels, H, W = height and width, R = rows of a solver's table, K = its columns.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from shared.specs.diffusion import DiffusionSpec, plan_of
from shared.specs.tasks import Generate, Interpolate, Levels, Sampling
from worker.families.family import IN_USE, DataInfo, Draw, SlotState
from worker.families.nets.denoiser import Denoiser, num_classes_of, objective_of, spread
from worker.families.nets.latents import space_of
from worker.families.nets.solvers import COLUMNS, karras, num_evaluations, padded, table_of
from worker.kernels.noise import Noise

FIRST, FRESH, UNLABELLED, LEVEL = range(4)
"""Streams of noise: the image's (in a sampler: the first one), a step's own, and what only training draws."""
MOST_STEPS: Final = 1000
EVERYWHERE: Final = (0.0, float("inf"))


class Solve:
    """What all samplers share: each slot follows its own table (``worker.families.nets.solvers``).

    One step is one evaluation of the network for every slot. Images are float64 in the state, as rounding errors
    would add up over a thousand steps; the network sees float32.
    """

    num_rows: int = num_evaluations("heun", MOST_STEPS)
    """Of the tables of all slots, whatever they were asked for."""

    def __init__(self, spec: DiffusionSpec, data: DataInfo) -> None:
        self.shape_CHW, self.num_classes = space_of(spec, data), num_classes_of(spec, data)
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

    def levels(self, steps: int, schedule: Levels = "karras") -> Tensor:
        """``steps`` noise levels from the highest that the model was trained at, then zero: float64 ``(N,)``."""
        if schedule == "uniform":
            return self.objective.levels_at_equal_times(steps)
        return karras(steps, self.objective.sigma_min, self.objective.sigma_max)

    def step(self, net: Denoiser, state: SlotState, noise: Noise) -> SlotState:
        """Evaluate the network once, for slots that are each at their own row."""
        row_S = noise.step_B.clamp(max=self.num_rows - 1)
        here_SK = state["table"][torch.arange(len(row_S), device=row_S.device), row_S]
        at = dict(zip(COLUMNS, here_SK.unbind(1), strict=True))
        x_SCHW, memory_SCHW = state["x"], state["memory"]
        # Asked before the network is begun, whose end a device would have to reach first to answer.
        adds_noise = bool(at["x_from_n"].any())
        estimate_SCHW = self.estimate(net, state, at["sigma"])
        # Not in place and never by addcmul: with one rounding less, some slots would differ in the last bit.
        next_SCHW = (
            spread(at["x_from_x"]) * x_SCHW
            + spread(at["x_from_D"]) * estimate_SCHW
            + spread(at["x_from_m"]) * memory_SCHW
        )
        if adds_noise:
            fresh_SCHW = spread(at["x_from_n"]) * noise.normal(*self.shape_CHW, stream=FRESH).double()
            next_SCHW = torch.where(spread(at["x_from_n"]) > 0, next_SCHW + fresh_SCHW, next_SCHW)
        memory_SCHW = (
            spread(at["m_from_x"]) * x_SCHW
            + spread(at["m_from_D"]) * estimate_SCHW
            + spread(at["m_from_m"]) * memory_SCHW
        )
        return {"x": next_SCHW, "memory": memory_SCHW, "estimate": estimate_SCHW}

    def estimate(self, net: Denoiser, state: SlotState, sigma_S: Tensor) -> Tensor:
        """D(x; sigma) of every slot, guided where its request asks for it at this noise level.

        Whatever a sample is known to satisfy is put into this estimate, here and nowhere else.
        """
        scale_S, low_S, high_S = state["guidance"].unbind(1)
        in_use_S = state.get(IN_USE, torch.ones_like(scale_S, dtype=torch.bool))
        is_guided_S = in_use_S & (scale_S != 1) & (sigma_S > low_S) & (sigma_S <= high_S)
        guided_G = is_guided_S.nonzero().flatten()  # before the network is begun, as above
        if not len(guided_G):
            return net(state["x"], sigma_S, state["label"])
        estimate_SCHW, unlabelled_SCHW = self.with_and_without_class(net, state | {IN_USE: in_use_S}, sigma_S, guided_G)
        guided_SCHW = unlabelled_SCHW + spread(scale_S) * (estimate_SCHW - unlabelled_SCHW)
        return torch.where(spread(is_guided_S), guided_SCHW, estimate_SCHW)

    def with_and_without_class(
        self, net: Denoiser, state: SlotState, sigma_S: Tensor, guided_G: Tensor
    ) -> tuple[Tensor, Tensor]:
        """D(x; sigma) of every slot, and of the slots ``guided`` without their class.

        Always of as many slots as there are, as the shape decides about the bits: once where those without their class
        find room in slots that are not in use, and twice otherwise.
        """
        # Copies, so that gradients of the two are added up in one order, however they were computed.
        x_SCHW, unlabelled_SCHW, label_S = state["x"].clone(), state["x"].clone(), state["label"]
        none_S = torch.full_like(label_S, net.num_classes)
        free_F = state[IN_USE].logical_not().nonzero().flatten()
        if len(guided_G) > len(free_F):
            return net(x_SCHW, sigma_S, label_S), net(unlabelled_SCHW, sigma_S, none_S)
        at_G = free_F[: len(guided_G)]
        pairs = (x_SCHW, unlabelled_SCHW), (sigma_S, sigma_S), (label_S, none_S)
        both_SCHW = net(*(mine_S.index_copy(0, at_G, other_S.index_select(0, guided_G)) for mine_S, other_S in pairs))
        # Rows that are not in use let go of it: what they are taken for must not pull at who borrowed them.
        return both_SCHW.index_fill(0, at_G, 0.0), both_SCHW.index_copy(0, guided_G, both_SCHW.index_select(0, at_G))

    def finish(self, net: Denoiser, state: SlotState) -> Tensor:
        return net.decode(state["x"])

    def look(self, net: Denoiser, state: SlotState) -> Tensor:
        """What the network takes the images for that they will become."""
        return net.decode(state["estimate"])


def guidance_of(request: Sampling) -> tuple[float, float, float]:
    """Scale of guidance, and the noise levels above and up to which it acts."""
    return request.guidance_scale, *(request.guidance_interval or EVERYWHERE)


class FromImages(Solve):
    """Begins at images, and noise that is added to what the network makes of them."""

    def start_at(
        self, draws: Sequence[Draw[Any]], noise_SCHW: Tensor, tables: Sequence[Tensor], *, is_seen_S: Tensor
    ) -> SlotState:
        """The state before the first step, which sees the network and encodes the images that ``is_seen`` says."""
        image_SCHW = inputs_of(draws, "image", noise_SCHW.device)
        return self.state(noise_SCHW, tables, draws) | {"image": image_SCHW, "is_seen": is_seen_S}

    def step(self, net: Denoiser, state: SlotState, noise: Noise) -> SlotState:
        is_new_S = noise.step_B == 0
        if is_new_S.any():
            # All slots, as the shape decides about the bits.
            begun_SCHW = state["x"] + net.encode(state["image"])
            state = state | {"x": torch.where(spread(is_new_S & state["is_seen"]), begun_SCHW, state["x"])}
        return super().step(net, state, noise)


def inputs_of(draws: Sequence[Draw[Any]], name: str, device: torch.device) -> Tensor:
    """One of the draws' inputs, with a slot axis."""
    return torch.stack([draw.inputs[name] for draw in draws if draw.inputs is not None]).to(device)


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
        return table_of(solver, self.levels(steps, request.schedule), eta)
