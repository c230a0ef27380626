"""The noise that diffusion networks are trained with, as numbers. Knows no torch, so that the API can compare."""

from typing import Final, Literal

Objective = Literal["edm", "eps", "v", "x0", "flow"]
"""What a network predicts: EDM's preconditioned mixture; the noise, velocity or image of DDPM's process; or the
direction of rectified flow."""

NUM_TIMES: Final = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02
"""The linear schedule of DDPM: variance of the noise that is added in each of its 1000 steps."""
FLOW_TIME: Final = 1000.0
"""What the flow network is told at time 1, as by diffusers."""
EDM_TIME: Final = 100.0
"""Stretches ``c_noise`` of ``edm``: the network sees it in waves made for times up to 1000, the fastest of which would
not make half a turn between the lowest noise level and the highest."""
LOWEST_SIGMA, HIGHEST_SIGMA = 0.002, 80.0
"""Between which noise levels ``edm`` and ``flow`` are solved (Karras et al., 2022, table 1)."""
