"""How to go from noise to an image, as tables: one row per evaluation of the network.

In the coordinates ``x = x0 + sigma n`` every solver here is linear in what it has at hand, so that an evaluation
at noise level ``sigma`` with estimate ``D = D(x; sigma)`` is

    x'      = x_from_x x + x_from_D D + x_from_m m + x_from_n n
    m'      = m_from_x x + m_from_D D + m_from_m m

with fresh noise n and one tensor m that is remembered. All that tells Euler from DPM-Solver++ is the eight numbers
of a row, and slots with different solvers, numbers of steps and noise levels are stepped by one formula.
DDPM's and rectified flow's own coordinates are these, scaled (table 1 and section 4 of Karras et al., 2022), and
DDIM's step is Euler's. Shape suffixes: N = noise levels, R = rows, K = columns.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor

from shared.specs.tasks import Solver

COLUMNS: Final = ("sigma", "x_from_x", "x_from_D", "x_from_m", "x_from_n", "m_from_x", "m_from_D", "m_from_m")
REST: Final = (1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""The row of a slot that has arrived: it stays where it is."""
RHO: Final = 7.0


def karras(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """``steps`` noise levels from ``sigma_max`` to ``sigma_min``, then zero: float64 ``(N,)`` (equation 5)."""
    ramp_N = torch.linspace(0, 1, steps, dtype=torch.float64)
    ends = sigma_max ** (1 / RHO), sigma_min ** (1 / RHO)
    sigma_N = (ends[0] + ramp_N * (ends[1] - ends[0])) ** RHO
    return torch.cat((sigma_N, torch.zeros(1, dtype=torch.float64)))


def _rows(**columns: Tensor) -> Tensor:
    """The table ``(R, K)`` of the named columns, zero where they are left out."""
    zero_R = torch.zeros_like(columns["sigma"])
    return torch.stack([columns.get(name, zero_R) for name in COLUMNS], dim=1)


def euler(sigma_N: Tensor) -> Tensor:
    """``x' = x + (s' - s) d`` with ``d = (x - D) / s``; up or down."""
    sigma_R, next_R = sigma_N[:-1], sigma_N[1:]
    return _rows(sigma=sigma_R, x_from_x=next_R / sigma_R, x_from_D=1 - next_R / sigma_R)


def heun(sigma_N: Tensor) -> Tensor:
    """Algorithm 1 of Karras et al. (2022): each step to a noise level above zero is corrected, and has two rows.

    The first remembers ``x + (s' - s) d / 2``, to which the second adds the other half, ``(s' - s) d' / 2``.
    """
    predictor = euler(sigma_N)
    sigma_R, next_R = sigma_N[:-1], sigma_N[1:]
    half_R = (next_R - sigma_R) / 2
    keeps_R = next_R > 0
    predictor[:, COLUMNS.index("m_from_x")] = torch.where(keeps_R, 1 + half_R / sigma_R, 0)
    predictor[:, COLUMNS.index("m_from_D")] = torch.where(keeps_R, -half_R / sigma_R, 0)
    corrector = _rows(
        sigma=next_R, x_from_x=half_R / next_R, x_from_D=-half_R / next_R, x_from_m=torch.ones_like(half_R)
    )
    both = torch.stack((predictor, corrector), dim=1).flatten(0, 1)
    return both[both[:, 0] > 0]


def ddim(sigma_N: Tensor, eta: float) -> Tensor:
    """DDIM (Song et al., 2020, equation 12): down below the next noise level, then up to it with fresh noise.

    The fresh part is ``eta`` times the deviation of the posterior, ``s' sqrt(1 - s'^2 / s^2)`` in these coordinates.
    """
    sigma_R, next_R = sigma_N[:-1], sigma_N[1:]
    fresh_R = eta * next_R * (1 - (next_R / sigma_R) ** 2).sqrt()
    kept_R = (next_R**2 - fresh_R**2).sqrt() / sigma_R
    return _rows(sigma=sigma_R, x_from_x=kept_R, x_from_D=1 - kept_R, x_from_n=fresh_R)


def renoising(sigma_N: Tensor) -> Tensor:
    """Takes each estimate for the image and adds fresh noise to it, up to the next level."""
    sigma_R, next_R = sigma_N[:-1], sigma_N[1:]
    return _rows(sigma=sigma_R, x_from_D=torch.ones_like(sigma_R), x_from_n=next_R)


def averaging(table_RK: Tensor, times: int) -> Tensor:
    """The mean of what ``times`` passes through a table come to, each from noise of its own: ``(times R, K)``.

    Of a table that remembers nothing and ends in an estimate of the image.
    """
    one = table_RK.clone()
    one[:, COLUMNS.index("m_from_m")] = 1
    one[-1, COLUMNS.index("m_from_D")] = 1 / times
    again, last = one.clone(), one.clone()
    again[-1, COLUMNS.index("x_from_D")] = 0
    again[-1, COLUMNS.index("x_from_n")] = table_RK[0, COLUMNS.index("sigma")]
    last[-1, COLUMNS.index("x_from_D")] = 1 / times
    last[-1, COLUMNS.index("x_from_m")] = 1
    return torch.cat([*[again] * (times - 1), last])


def ddpm(sigma_N: Tensor) -> Tensor:
    """Ancestral sampling with the posterior's variance (Ho et al., 2020, equation 7)."""
    return ddim(sigma_N, 1.0)


def dpmpp_2m(sigma_N: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., 2022b, algorithm 2): extrapolates D linearly in ``ln sigma``, remembers the last.

    The first step and the one to zero are of first order, having nothing to extrapolate from or towards.
    """
    sigma_R, next_R = sigma_N[:-1], sigma_N[1:]
    ratio_R = next_R / sigma_R
    # r = h_last / h of the paper, with h = ln s - ln s'; half its inverse is zero in steps of first order.
    log_steps_R = -ratio_R.log()
    extra_R = torch.zeros_like(sigma_R)
    extra_R[1:] = torch.where(next_R[1:] > 0, log_steps_R[1:] / (2 * log_steps_R[:-1]), 0)
    return _rows(
        sigma=sigma_R,
        x_from_x=ratio_R,
        x_from_D=(1 - ratio_R) * (1 + extra_R),
        x_from_m=-(1 - ratio_R) * extra_R,
        m_from_D=torch.ones_like(sigma_R),
    )


SOLVERS: Final[Mapping[Solver, Callable[[Tensor], Tensor]]] = {
    "euler": euler,
    "heun": heun,
    "ddim": partial(ddim, eta=0.0),
    "ddpm": ddpm,
    "dpmpp_2m": dpmpp_2m,
}
"""Noise levels ``(N,)`` to a table ``(R, K)``."""


def table_of(solver: Solver, sigma_N: Tensor, eta: float = 0.0) -> Tensor:
    """The table ``(R, K)`` of a solver; ``eta`` is DDIM's."""
    return ddim(sigma_N, eta) if eta else SOLVERS[solver](sigma_N)


def num_evaluations(solver: Solver, steps: int) -> int:
    """Rows of a table from noise to an image."""
    return 2 * steps - 1 if solver == "heun" else steps


def padded(table_RK: Tensor, num_rows: int) -> Tensor:
    """The table with rows of rest up to ``num_rows``, so that tables of all slots have one shape."""
    rest_RK = table_RK.new_tensor([REST]).expand(num_rows - len(table_RK), -1)
    return torch.cat((table_RK, rest_RK))
