"""Two families that the registry does not know: what the engine must do for any family, it must do for these."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from shared.specs.spec import Modality, Seed, Spec
from shared.specs.training import TrainSpec
from worker.families.family import Batch, DataInfo, Draw, Family, Measured, SlotState
from worker.kernels.noise import Noise


class ToySpec(TrainSpec):
    """A family of tests."""

    modality: ClassVar[Modality] = "image"
    tasks: ClassVar[Mapping[str, frozenset[str]]] = {"walk": frozenset()}
    family: Literal["toy"] = "toy"


class Walk(Spec):
    """A random walk of ``steps`` steps."""

    seed: Seed = 0
    steps: int = 3


class Duel(nn.Module):
    """Two parts that are trained against one another."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.generator = nn.Linear(2, num_features)
        self.critic = nn.Linear(num_features, 1)
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(num_features), persistent=False)
        """A running mean of the features, which no state dict mentions."""


def build(spec: ToySpec, data: DataInfo) -> Duel:
    return Duel(torch.Size(data.shape).numel())


def critic_loss(spec: ToySpec, net: Duel, batch: Batch, noise: Noise) -> Measured:
    features = batch["image"].flatten(1).float() / 255
    if net.training:
        net.centre.lerp_(features.mean(0), 0.1)
    real = net.critic(features - net.centre)
    fake = net.critic(net.generator(noise.normal(2)).detach())
    loss = (fake - real).mean() + 0.1 * real.square().mean()
    return Measured(loss=loss, values={"margin": (real - fake).mean()})


def generator_loss(spec: ToySpec, net: Duel, batch: Batch, noise: Noise) -> Measured:
    loss = -net.critic(net.generator(noise.normal(2, stream=1))).mean()
    return Measured(loss=loss, values={})


class Walker:
    """Adds fresh noise and a small network output in every step; walks may differ in length."""

    def __init__(self, spec: ToySpec, data: DataInfo) -> None:
        self.shape = data.shape

    def num_steps(self, request: Walk) -> int:
        return request.steps

    def start(self, draws: Sequence[Draw[Walk]], noise: Noise) -> SlotState:
        return {"x": noise.normal(*self.shape)}

    def step(self, net: Duel, state: SlotState, noise: Noise) -> SlotState:
        pull = net.generator(state["x"].flatten(1)[:, :2]).tanh()
        return {"x": 0.7 * state["x"] + 0.2 * pull.view_as(state["x"]) + noise.normal(*self.shape, stream=1)}

    def finish(self, net: Any, state: SlotState) -> Tensor:
        return state["x"]


TOY = Family(
    spec=ToySpec, build=build, losses={"critic": critic_loss, "generator": generator_loss}, tasks={"walk": Walker}
)
