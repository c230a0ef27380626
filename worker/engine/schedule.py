"""What changes over a training, each as a pure function of the step, so that a resume needs only the step."""

from math import cos, pi
from typing import Literal

Schedule = Literal["cosine", "constant"]


def learning_rate(step: int, *, peak: float, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Linear warm-up to ``peak`` in ``warmup_steps``, then constant, or half a cosine down to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (1 + cos(pi * min(1.0, done))) / 2


def warmup_steps(asked: int | None, steps: int) -> int:
    """Steps of warm-up of a training of ``steps`` steps."""
    return min(100, steps // 10) if asked is None else asked


def ema_decay(step: int, *, longest: float) -> float:
    """Decay of the weight average: short at first, so that it forgets the initial weights."""
    return min(longest, (1 + step) / (10 + step))
