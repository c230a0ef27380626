"""Blocks whose inner results can be computed again in the backward pass instead of being kept (Chen et al., 2016,
arXiv 1604.06174)."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from worker.families.nets.dropout import Dropout


class Recomputed(nn.Module):
    """A block of a network that keeps its inputs alone, once ``recompute`` is set; its gradients have the same bits."""

    recompute = False

    def __call__(self, *inputs: Any) -> Any:
        if not (self.recompute and torch.is_grad_enabled()):
            return super().__call__(*inputs)
        dropout = next((module for module in self.modules() if isinstance(module, Dropout)), None)
        again = nullcontext() if dropout is None else dropout.again()
        # Noise is keyed: there is no generator whose state would have to be kept.
        return checkpoint(
            super().__call__,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), again),
        )
