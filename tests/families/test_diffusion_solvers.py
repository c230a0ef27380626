"""Noise levels and solvers against diffusers' schedulers, with the same network, weights and noise."""

from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from torch import Tensor, nn

from shared.specs.tasks import Solver
from worker.families.nets.denoiser import Denoiser, spread
from worker.families.nets.preconditioning import Edm, Flow, VariancePreserving, ddpm_log_sigmas
from worker.families.nets.solvers import (
    COLUMNS,
    SOLVERS,
    averaging,
    karras,
    num_evaluations,
    padded,
    table_of,
)
from worker.families.nets.unet import UNet, UNetLayout
from worker.kernels.noise import Domain, Noise

CPU = torch.device("cpu")
SHAPE = (2, 8, 8)
TINY = UNetLayout(block_out_channels=(16, 32), layers_per_block=1, attention_level=1, norm_num_groups=8)
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
LABEL = torch.zeros(3, dtype=torch.long)
EDM = Edm(0.5)
NUMPY_1 = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def keyed(step: int = 0, stream: int = 0) -> Tensor:
    return Noise.of_step(Domain.SAMPLING, 3, step, range(3), CPU).normal(*SHAPE, stream=stream)


@pytest.fixture(scope="module")
def unet() -> UNet:
    net = UNet(TINY, SHAPE[0]).eval().requires_grad_(requires_grad=False)
    for number, parameter in enumerate(net.parameters()):
        drawn = Noise.of_step(Domain.TRAINING, 1, number, range(1), CPU).normal(*parameter.shape)[0]
        parameter.copy_(drawn * (0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5))
    return net


class Whole(nn.Module):
    """A network that sees whole times only: the last bit of a float32 time, which is nobody's choice, moves a wave."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.unet(x, t.round(), label)


def solved(unet: nn.Module, objective: nn.Module, table: Tensor, x: Tensor, fresh: Iterator[Tensor]) -> Tensor:
    """Follow a table, as the sampler does."""
    net = Denoiser(unet, objective, 0)
    x, memory = x.double(), torch.zeros_like(x, dtype=torch.float64)
    for row in table:
        at = dict(zip(COLUMNS, row, strict=True))
        estimate = net(x, at["sigma"].expand(len(x)), LABEL)
        new = at["x_from_x"] * x + at["x_from_D"] * estimate + at["x_from_m"] * memory
        if at["x_from_n"]:
            new = new + at["x_from_n"] * next(fresh)
        memory = at["m_from_x"] * x + at["m_from_D"] * estimate + at["m_from_m"] * memory
        x = new
    return x


def scheduled(
    unet: nn.Module, scheduler: object, x: Tensor, of_output: Callable[[Tensor], Tensor] = lambda f: f
) -> Tensor:
    """The loop of a pipeline of diffusers."""
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = of_output(unet(scaled.float(), t.float().expand(len(x)), LABEL))
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def same(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of the image's scale, and no trivial image."""
    assert 0.1 < theirs.abs().max() < 1e4
    assert (ours - theirs.double()).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("steps", [1, 2, 18, 1000])
def test_the_noise_levels_are_those_of_edm(steps: int) -> None:
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, rho=7)
    scheduler.set_timesteps(steps)

    assert torch.allclose(karras(steps, 0.002, 80), scheduler.sigmas.double(), rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_the_preconditioning_is_that_of_edm(unet: UNet, sigma: float) -> None:
    scheduler, x = EDMEulerScheduler(sigma_data=0.5), keyed() + sigma * keyed(stream=1)
    t = scheduler.precondition_noise(torch.tensor(sigma))
    output = unet(scheduler.precondition_inputs(x, sigma), t.expand(3), LABEL)

    theirs = scheduler.precondition_outputs(x, output, torch.tensor(sigma))

    same(Denoiser(unet, EDM, 0)(x.double(), torch.full((3,), sigma, dtype=torch.float64), LABEL), theirs)


# In one step from 80, diffusers' float32 rounds away more than the 1e-5 that are asked for.
@pytest.mark.parametrize(("steps", "highest"), [(1, 8), (2, 8), (7, 80), (18, 80)])
def test_euler_is_edm_euler(unet: UNet, steps: int, highest: float) -> None:
    scheduler = EDMEulerScheduler(sigma_max=highest)
    scheduler.set_timesteps(steps)

    ours = solved(unet, EDM, table_of("euler", karras(steps, 0.002, highest)), keyed() * highest, iter(()))

    same(ours, scheduled(unet, scheduler, keyed() * highest))


@pytest.mark.parametrize("steps", [2, 7, 18])
def test_dpmpp_2m_is_edm_dpm_solver_multistep(unet: UNet, steps: int) -> None:
    scheduler = EDMDPMSolverMultistepScheduler(solver_order=2)
    scheduler.set_timesteps(steps)

    ours = solved(unet, EDM, table_of("dpmpp_2m", karras(steps, 0.002, 80)), keyed() * 80, iter(()))

    same(ours, scheduled(unet, scheduler, keyed() * 80))


@NUMPY_1
@pytest.mark.parametrize(("prediction", "name"), [("eps", "epsilon"), ("v", "v_prediction")])
def test_heun_is_heun_discrete(unet: UNet, prediction: str, name: str) -> None:
    scheduler = HeunDiscreteScheduler(
        **LINEAR, use_karras_sigmas=True, prediction_type=name, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(6)
    objective = VariancePreserving(prediction)

    ours = solved(
        Whole(unet), objective, table_of("heun", levels(objective, 6)), keyed() * objective.sigma_max, iter(())
    )

    same(ours, scheduled(Whole(unet), scheduler, keyed() * objective.sigma_max))


@NUMPY_1
@pytest.mark.parametrize(("prediction", "name"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_euler_is_euler_discrete(unet: UNet, prediction: str, name: str) -> None:
    scheduler = EulerDiscreteScheduler(**LINEAR, use_karras_sigmas=True, prediction_type=name)
    scheduler.set_timesteps(6)
    objective = VariancePreserving(prediction)

    ours = solved(
        Whole(unet), objective, table_of("euler", levels(objective, 6)), keyed() * objective.sigma_max, iter(())
    )

    same(ours, scheduled(Whole(unet), scheduler, keyed() * objective.sigma_max))


@NUMPY_1
def test_the_times_between_those_of_ddpm_are_diffusers() -> None:
    scheduler = EulerDiscreteScheduler(**LINEAR, use_karras_sigmas=True)
    scheduler.set_timesteps(50)
    objective = VariancePreserving("eps")

    ours = objective.time_of(levels(objective, 50)[:-1])

    assert torch.allclose(ours, scheduler.timesteps.double(), atol=1e-2)  # theirs are of float32 products


def levels(objective: VariancePreserving, steps: int) -> Tensor:
    return karras(steps, objective.sigma_min, objective.sigma_max)


def levels_at(times: Tensor) -> Tensor:
    return torch.cat((ddpm_log_sigmas()[times].exp(), torch.zeros(1, dtype=torch.float64)))


@pytest.mark.parametrize(("prediction", "name"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_ddim(unet: UNet, eta: float, prediction: str, name: str) -> None:
    scheduler = DDIMScheduler(**LINEAR, clip_sample=False, prediction_type=name)
    scheduler.set_timesteps(8)
    sigmas = levels_at(scheduler.timesteps)
    theirs = keyed() * sigmas[0] / (1 + sigmas[0] ** 2).sqrt()
    for step, t in enumerate(scheduler.timesteps):
        output = unet(theirs.float(), t.float().expand(3), LABEL)
        theirs = scheduler.step(output, t, theirs, eta=eta, variance_noise=keyed(step, 1)).prev_sample

    table = table_of("ddim", sigmas, eta)
    ours = solved(unet, VariancePreserving(prediction), table, keyed() * sigmas[0], (keyed(n, 1) for n in range(8)))

    same(ours, theirs)


def test_ddpm_is_ddpm(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDPMScheduler(**LINEAR, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(8)
    sigmas = levels_at(scheduler.timesteps)
    fresh = (keyed(step, 1) for step in range(8))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(fresh))

    ours = solved(
        unet,
        VariancePreserving("eps"),
        table_of("ddpm", sigmas),
        keyed() * sigmas[0],
        (keyed(n, 1) for n in range(8)),
    )

    same(ours, scheduled(unet, scheduler, keyed() * sigmas[0] / (1 + sigmas[0] ** 2).sqrt()))


def test_flow_is_flow_match_euler(unet: UNet) -> None:
    """In the flow's own coordinates, ``(1 - t) x``."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.98, 0.8, 0.5, 0.2, 0.01])
    times = scheduler.sigmas.double()
    sigmas = times / (1 - times)

    ours = solved(unet, Flow(), table_of("euler", sigmas), keyed() * sigmas[0], iter(()))

    same(ours, scheduled(unet, scheduler, keyed() * times[0]))


def test_the_times_of_ddpm_are_told_as_their_numbers() -> None:
    times = torch.tensor([0, 1, 17, 500, 998, 999])

    assert torch.allclose(VariancePreserving("eps").time_of(ddpm_log_sigmas()[times].exp()), times.double(), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_table_ends_without_noise_after_the_promised_evaluations(solver: Solver, steps: int) -> None:
    table = table_of(solver, karras(steps, 0.002, 80))

    last = dict(zip(COLUMNS, table[-1].tolist(), strict=True))
    assert len(table) == num_evaluations(solver, steps)
    assert (last["x_from_x"], last["x_from_D"], last["x_from_m"], last["x_from_n"]) == (0, 1, 0, 0)
    assert table.isfinite().all()


def test_a_slot_that_has_arrived_stays() -> None:
    rest = dict(zip(COLUMNS, padded(table_of("heun", karras(2, 0.002, 80)), 9)[-1].tolist(), strict=True))

    assert rest == {
        "sigma": 1,
        "x_from_x": 1,
        "x_from_D": 0,
        "x_from_m": 0,
        "x_from_n": 0,
        "m_from_x": 0,
        "m_from_D": 0,
        "m_from_m": 0,
    }


def test_an_average_is_the_mean_of_passes_that_know_nothing_of_each_other(unet: UNet) -> None:
    table = table_of("ddpm", karras(6, 0.002, 80))
    per_pass = 1 + int((table[:, COLUMNS.index("x_from_n")] > 0).sum())
    noise = [keyed(number).double() for number in range(3 * per_pass)]

    def drawn(table: Tensor, noise: list[Tensor]) -> Tensor:
        return solved(unet, EDM, table, 80 * noise[0], iter(noise[1:]))

    alone = [drawn(table, noise[first : first + per_pass]) for first in range(0, len(noise), per_pass)]
    together = drawn(averaging(table, 3), noise)

    assert torch.allclose(together, torch.stack(alone).mean(0), rtol=1e-9)
    assert not torch.allclose(alone[0], alone[1], rtol=1e-2)


def test_spread_puts_a_number_on_each_image() -> None:
    assert spread(torch.arange(3)).shape == (3, 1, 1, 1)
