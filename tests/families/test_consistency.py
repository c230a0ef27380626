"""Consistency tuning: the loss and the schedule of the paper, and samples of one to four evaluations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic_core import PydanticCustomError
from torch import Tensor

from shared.errors import ModelLoadFailed
from shared.specs.consistency import ConsistencySpec
from shared.specs.tasks import Generate
from tests.families.test_diffusion import BATCH, CPU, TINY, spec_of, trained
from worker.engine.sampling import Tile, sample
from worker.families.consistency import FAMILY, build, loss, nearer
from worker.families.family import DataInfo, Draw, Origin
from worker.families.nets.denoiser import Denoiser, centred
from worker.kernels.noise import Domain, Noise


def data_of(**fields: Any) -> DataInfo:
    """Data of a tuning whose diffusion model has these fields."""
    spec = spec_of(**fields).model_dump(mode="json")
    origin = Origin(family="diffusion", spec=spec, data=TINY)
    return DataInfo(shape=TINY.shape, num_classes=TINY.num_classes, models={"init_from": origin})


def tuning(**fields: Any) -> ConsistencySpec:
    return ConsistencySpec(
        family="consistency", dataset="ds_" + "0" * 32, model="m", init_from="m@1", steps=80, **fields
    )


def tuned(data: DataInfo) -> Denoiser:
    """The network of a tuning, with the weights of a diffusion model none of whose layers is zero."""
    net = build(tuning(), data).eval().requires_grad_(requires_grad=False)
    net.load_state_dict(trained(spec_of(**_fields(data))).state_dict())
    return net


def _fields(data: DataInfo) -> dict[str, Any]:
    return {name: data.models["init_from"].spec[name] for name in ("network", "preset", "objective")}


@pytest.mark.parametrize("objective", ["edm", "eps", "v", "flow"])
def test_the_network_ends_in_its_input(objective: str) -> None:
    data = data_of(objective=objective)
    net = tuned(data)
    x0 = centred(BATCH["image"])
    lowest = torch.full((6,), net.objective.sigma_min * 1e-3, dtype=torch.float64)

    assert torch.allclose(net(x0, lowest, BATCH["label"]), x0, atol=1e-3)


def test_a_network_that_does_not_is_refused() -> None:
    with pytest.raises(ModelLoadFailed, match="x0"):
        build(tuning(), data_of(objective="x0"))


def test_a_model_without_classes_is_tuned_to_one_without_whatever_the_data_has() -> None:
    origin = Origin(family="diffusion", spec=spec_of().model_dump(mode="json"), data=replace(TINY, num_classes=0))
    data = replace(TINY, num_classes=3, models={"init_from": origin})
    draw = Draw(request=Generate(task="generate", model="m"), index=2)

    state = FAMILY.tasks["generate"](tuning(), data).start([draw], Noise.of_step(Domain.SAMPLING, 0, 0, range(1), CPU))

    assert (build(tuning(), data).num_classes, tuning().num_classes(data.as_json())) == (0, 0)
    assert state["label"].tolist() == [0]


def test_the_two_levels_come_closer_from_stage_to_stage() -> None:
    sigma = torch.tensor([0.01, 0.3, 2.0, 60.0], dtype=torch.float64)
    spec = tuning(stages=8)

    ratios = torch.stack([nearer(spec, sigma, step) / sigma for step in range(spec.steps)])

    assert ((ratios >= 0) & (ratios < 1)).all()
    assert (ratios.diff(dim=0) >= 0).all()
    assert len(ratios[:, 3].unique()) == spec.stages
    # Far out n(sigma) is 1: the first stage goes half the way to zero. Near the image it is 5: all the way.
    assert ratios[0].tolist() == pytest.approx([0, 0, 1 - (1 + 8 / (1 + torch.e**2)) / 2, 0.5], abs=1e-6)


@pytest.mark.parametrize("step", [0, 35, 79])
@pytest.mark.parametrize("huber", [0.0, 0.03])
def test_the_loss_is_the_papers_in_float64(step: int, huber: float) -> None:
    spec, net = tuning(huber=huber), tuned(data_of())
    keyed = Noise.of_step(Domain.TRAINING, 5, step, range(6), CPU)

    measured = loss(spec, net, BATCH, keyed)

    sigma = (-1.1 + 2.0 * keyed.normal(stream=3).double()).exp().clamp(0.002, 80)
    x0, n = BATCH["image"].double() / 255 * 2 - 1, keyed.normal(*TINY.shape, stream=0).double()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(6):
        s = sigma[row]
        apart = (1 + 8 / (1 + s.exp())) / 2.0 ** (step * 8 // 80 + 1)
        r = s * max(0.0, 1 - apart.item())
        at = (BATCH["label"][row : row + 1],)
        upper = net((x0 + s * n)[row : row + 1], s[None], *at)
        lower = net((x0 + r * n)[row : row + 1], r[None].clamp(min=0.002), *at) if r > 0 else x0[row : row + 1]
        error = (upper - lower).square().mean()
        total += ((error + huber**2).sqrt() - huber if huber else error) / (s - r) / 6
    assert measured.loss.item() == pytest.approx(total.item(), rel=1e-4)


def test_only_the_upper_estimate_is_learned_from() -> None:
    net = build(tuning(), data_of())
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    keyed = Noise.of_step(Domain.TRAINING, 5, 79, range(6), CPU)
    calls: list[bool] = []
    net.network.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    loss(tuning(), net, BATCH, keyed).loss.backward()

    assert calls == [True, False]
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.parameters())


def draw(net: Denoiser, data: DataInfo, **fields: Any) -> Tensor:
    request = Generate(task="generate", model="m", seed=9, **fields)
    draws = [Draw(request=request, index=index) for index in range(3)]
    tile = Tile(net, FAMILY.tasks["generate"](tuning(), data), draws[0], CPU, width=4)
    return torch.stack([image for _, image in sample(tile, draws)])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_sample_is_an_estimate_of_an_estimate(steps: int) -> None:
    data = data_of()
    net = tuned(data)

    drawn = draw(net, data, steps=steps, labels=[2])

    keys = {"domain": Domain.SAMPLING, "seed_B": torch.full((3,), 9), "index_B": torch.arange(3)}
    x = 80.0 * Noise(**keys, step_B=torch.zeros(3, dtype=torch.long)).normal(*TINY.shape).double()
    level, estimate = 80.0, x
    for step in range(steps):
        estimate = net(x, torch.full((3,), level, dtype=torch.float64), torch.full((3,), 2))
        level = 0.82 / 2**step
        fresh = Noise(**keys, step_B=torch.full((3,), step)).normal(*TINY.shape, stream=1).double()
        x = estimate + level * fresh
    expected = ((estimate.clamp(-1, 1) + 1) * 127.5).round()
    assert (drawn - expected).abs().max() <= 1


def test_what_it_cannot_do_is_refused() -> None:
    info = data_of().as_json()
    without_classes = data_of(class_conditional=False).as_json()

    def asked(**fields: Any) -> Generate:
        return Generate(task="generate", model="m", **fields)

    tuning().check_task(asked(steps=4, labels=[2]), info)
    for request, described, field in [
        (asked(steps=5), info, "steps"),
        (asked(labels=[3]), info, "labels"),
        (asked(labels=[0]), without_classes, "labels"),
        (asked(guidance_scale=2), info, "guidance_scale"),
    ]:
        with pytest.raises(PydanticCustomError) as refused:
            tuning().check_task(request, described)
        assert refused.value.context["field"] == field
