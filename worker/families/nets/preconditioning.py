"""What a diffusion network is trained to predict, as one denoiser: ``D(x; sigma)`` estimates the clean image.

Every objective is written as in EDM (Karras et al., 2022, arXiv 2206.00364, equation 7), for
``x = x0 + sigma n``:

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))

so that solvers need not know what F predicts, and one loss serves them all: the mean square distance
of F from the target at which D is exact, ``(x0 - c_skip x) / c_out`` (equation 8 with weight
``1 / c_out^2``). For ``eps`` that is the noise (Ho et al., 2020), for ``v`` the velocity of Salimans and
Ho (2022), for ``flow`` the direction ``n - x0`` (Liu et al., 2022). Shape suffixes: B = batch, T = time steps.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from shared.specs.noising import DDPM, FLOW_TIME, HIGHEST_SIGMA, LOWEST_SIGMA, Process
from worker.kernels.noise import Noise

Prediction = Literal["eps", "v", "x0"]


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The four functions of equation 7, each at the noise levels of a batch: float64 ``(B,)``."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Objective(Protocol):
    """What a network predicts, and at which noise levels it is trained."""

    sigma_min: float
    sigma_max: float
    """Between which noise levels a solver goes."""

    def scales(self, sigma_B: Tensor) -> Scales: ...

    def levels(self, noise: Noise, stream: int) -> Tensor:
        """Noise levels of a training batch, float64 ``(B,)``."""
        ...

    def levels_at_equal_times(self, steps: int) -> Tensor:
        """``steps`` noise levels from ``sigma_max`` down at equal steps of time, then zero: float64 ``(N,)``.

        ValueError where there is no time.
        """
        ...


class Edm(nn.Module):
    """The preconditioning and noise levels of EDM (table 1): ``ln sigma ~ N(mean, std^2)``."""

    sigma_min, sigma_max = LOWEST_SIGMA, HIGHEST_SIGMA

    def __init__(self, sigma_data: float, mean: float = -1.2, std: float = 1.2) -> None:
        super().__init__()
        self.sigma_data, self.mean, self.std = sigma_data, mean, std

    def scales(self, sigma_B: Tensor) -> Scales:
        total_B = sigma_B**2 + self.sigma_data**2
        return Scales(
            c_skip=self.sigma_data**2 / total_B,
            c_out=sigma_B * self.sigma_data / total_B.sqrt(),
            c_in=1 / total_B.sqrt(),
            c_noise=sigma_B.log() / 4,
        )

    def levels(self, noise: Noise, stream: int) -> Tensor:
        return (self.mean + self.std * noise.normal(stream=stream).double()).exp()

    def levels_at_equal_times(self, steps: int) -> Tensor:
        raise ValueError("edm has noise levels and no time")


class Flow(nn.Module):
    """Rectified flow from data at time 0 to noise at time 1: ``(1 - t) x0 + t n``, so ``sigma = t / (1 - t)``.

    The logit of t is normal (Esser et al., 2024), which makes sigma lognormal.
    """

    sigma_min, sigma_max = LOWEST_SIGMA, HIGHEST_SIGMA

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def scales(self, sigma_B: Tensor) -> Scales:
        one_minus_t_B = 1 / (1 + sigma_B)
        t_B = sigma_B * one_minus_t_B
        return Scales(c_skip=one_minus_t_B, c_out=-t_B, c_in=one_minus_t_B, c_noise=FLOW_TIME * t_B)

    def levels(self, noise: Noise, stream: int) -> Tensor:
        return (self.mean + self.std * noise.normal(stream=stream).double()).exp()

    def levels_at_equal_times(self, steps: int) -> Tensor:
        """Time falls from that of ``sigma_max``, 80/81, as a network is used to that has not seen time 1."""
        t_N = torch.linspace(self.sigma_max / (1 + self.sigma_max), 0, steps + 1, dtype=torch.float64)
        return t_N / (1 - t_N)


class VariancePreserving(nn.Module):
    """DDPM's process, in which the image shrinks as the noise grows; trained at its times, uniformly.

    Between the times, which the network is told as numbers from 0 on, time is linear in ``ln sigma``.
    """

    def __init__(self, prediction: Prediction, process: Process = DDPM) -> None:
        super().__init__()
        self.prediction: Prediction = prediction
        log_sigma_T = ddpm_log_sigmas(process)
        self.sigma_min, self.sigma_max = (end.exp().item() for end in log_sigma_T[[0, -1]])
        self.log_sigma_T: Tensor
        self.register_buffer("log_sigma_T", log_sigma_T, persistent=False)

    def scales(self, sigma_B: Tensor) -> Scales:
        alpha_B = (1 + sigma_B**2) ** -0.5
        c_skip, c_out = {
            "eps": (torch.ones_like(sigma_B), -sigma_B),
            "v": (alpha_B**2, -sigma_B * alpha_B),
            "x0": (torch.zeros_like(sigma_B), torch.ones_like(sigma_B)),
        }[self.prediction]
        return Scales(c_skip=c_skip, c_out=c_out, c_in=alpha_B, c_noise=self.time_of(sigma_B))

    def time_of(self, sigma_B: Tensor) -> Tensor:
        """The time, from 0 on, at which the process has this noise level."""
        log_sigma_B = sigma_B.log().clamp(self.log_sigma_T[0], self.log_sigma_T[-1])
        after_B = torch.searchsorted(self.log_sigma_T, log_sigma_B).clamp(min=1)
        low_B, high_B = self.log_sigma_T[after_B - 1], self.log_sigma_T[after_B]
        return after_B - 1 + (log_sigma_B - low_B) / (high_B - low_B)

    def levels(self, noise: Noise, stream: int) -> Tensor:
        time_B = (noise.uniform(stream=stream) * len(self.log_sigma_T)).long()
        return self.log_sigma_T[time_B].exp()

    def levels_at_equal_times(self, steps: int) -> Tensor:
        """At the process's times as diffusers' ``trailing`` spaces them: the last of each of ``steps`` parts of it
        (Lin et al., 2024, arXiv 2305.08891, table 2); no more than there are times."""
        # Rounded as numpy's arange is, which decides what lies half way between two times.
        num_times = len(self.log_sigma_T)
        part = num_times - (num_times - num_times / steps)
        ends_N = num_times - torch.arange(steps, dtype=torch.float64) * part
        sigma_N = self.log_sigma_T[ends_N.round().long() - 1].exp()
        return torch.cat((sigma_N, torch.zeros(1, dtype=torch.float64)))


def ddpm_log_sigmas(process: Process = DDPM) -> Tensor:
    """``ln sigma`` at the process's times, ascending: noise over signal, float64 ``(T,)``."""
    signal_T = (1 - betas_of(process)).cumprod(0)
    return 0.5 * ((1 - signal_T) / signal_T).log()


def betas_of(process: Process) -> Tensor:
    """Variance of the noise that each step adds, float64 ``(T,)``; diffusers' schedulers have them in float32."""
    if process.trained_betas is not None:
        return torch.tensor(process.trained_betas, dtype=torch.float64)
    num_times, first, last = process.num_train_timesteps, process.beta_start, process.beta_end
    match process.beta_schedule:
        case "linear":
            return torch.linspace(first, last, num_times, dtype=torch.float64)
        case "scaled_linear":
            return torch.linspace(first**0.5, last**0.5, num_times, dtype=torch.float64) ** 2
        case "sigmoid":
            return torch.linspace(-6, 6, num_times, dtype=torch.float64).sigmoid() * (last - first) + first
        case "squaredcos_cap_v2":
            # Equation 17 of Nichol and Dhariwal (2021, arXiv 2102.09672), where the signal is told instead of beta.
            time_N = torch.linspace(0, 1, num_times + 1, dtype=torch.float64)
            signal_N = ((time_N + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
            return (1 - signal_N[1:] / signal_N[:-1]).clamp(max=0.999)
