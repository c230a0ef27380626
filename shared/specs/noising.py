"""The noise that diffusion networks are trained with, as numbers. Knows no torch, so that the API can compare."""

from math import log1p
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from shared.specs.spec import FROM_LIST, Spec, wrong

Objective = Literal["edm", "eps", "v", "x0", "flow"]
"""What a network predicts: EDM's preconditioned mixture; the noise, velocity or image of DDPM's process; or the
direction of rectified flow."""

NUM_TIMES: Final = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02
"""The linear schedule of DDPM: variance of the noise that is added in each of its 1000 steps."""
MOST_NATS: Final = 45.0
"""``-ln`` of what is left of an image's variance at the end of a process: more would be lost in its noise."""
FLOW_TIME: Final = 1000.0
"""What the flow network is told at time 1, as by diffusers."""
EDM_TIME: Final = 100.0
"""Stretches ``c_noise`` of ``edm``: the network sees it in waves made for times up to 1000, the fastest of which would
not make half a turn between the lowest noise level and the highest."""
LOWEST_SIGMA, HIGHEST_SIGMA = 0.002, 80.0
"""Between which noise levels ``edm`` and ``flow`` are solved (Karras et al., 2022, table 1)."""


def telling(trained_betas: object, beta_schedule: object) -> tuple[str, ...]:
    """The fields of a process that mean something beside these two."""
    if trained_betas is not None:
        return ("num_train_timesteps", "trained_betas")
    ends = () if beta_schedule == "squaredcos_cap_v2" else ("beta_start", "beta_end")
    return ("num_train_timesteps", "beta_schedule", *ends)


class Process(Spec):
    """DDPM's process, in diffusers' words: an image becomes noise in steps, each of which adds some of variance beta.

    Of beta's ways from ``beta_start`` to ``beta_end``, ``linear`` is DDPM's, ``scaled_linear`` linear in the root and
    ``sigmoid`` that of a sigmoid from -6 to 6; ``squaredcos_cap_v2`` (Nichol and Dhariwal, 2021) has ends of its own.
    """

    num_train_timesteps: int = Field(default=NUM_TIMES, ge=2, le=10_000)
    """Number of steps; the network is told them from 0 on."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    """How beta rises."""
    beta_start: float = Field(default=FIRST_BETA, ge=1e-6, le=0.5)
    """Beta of the first step."""
    beta_end: float = Field(default=LAST_BETA, ge=1e-6, le=0.5)
    """Beta of the last step."""
    trained_betas: Annotated[tuple[Annotated[float, Field(ge=1e-6, le=0.9999)], ...], FROM_LIST] | None = None
    """Beta of each step, instead of a schedule."""

    def told(self) -> dict[str, Any]:
        """The fields that say what it is, as JSON."""
        return self.model_dump(mode="json", include=set(telling(self.trained_betas, self.beta_schedule)))

    @model_validator(mode="after")
    def _is_one_process(self) -> "Process":
        used = telling(self.trained_betas, self.beta_schedule)
        for name, field in Process.model_fields.items():
            if name not in used and getattr(self, name) != field.default:
                given = "trained_betas" if self.trained_betas is not None else self.beta_schedule
                raise wrong(name, f"{name} means nothing beside {given}")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            known = f"{len(self.trained_betas)} for {self.num_train_timesteps} steps"
            raise wrong("trained_betas", f"trained_betas needs a beta for each of num_train_timesteps, and has {known}")
        if (nats := self._most_nats()) > MOST_NATS:
            end = "trained_betas" if self.trained_betas is not None else "beta_end"
            raise wrong(end, f"by {end} the last step leaves less than e^-{nats:.0f} of an image, which noise drowns")
        return self

    def _most_nats(self) -> float:
        """``-ln`` of the product of ``1 - beta``, or a bound of it."""
        if self.trained_betas is not None:
            return -sum(log1p(-beta) for beta in self.trained_betas)
        if self.beta_schedule == "squaredcos_cap_v2":
            return 0.0
        # The sum of all betas, of which -ln(1 - beta) is at most so much more.
        highest = max(self.beta_start, self.beta_end)
        return self.num_train_timesteps * (self.beta_start + self.beta_end) / 2 * -log1p(-highest) / highest


DDPM: Final = Process()
"""The one of the paper, and of every model that does not say another."""
