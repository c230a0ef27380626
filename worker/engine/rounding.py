"""A second set of weights, rounded to bfloat16, to compute with: the first set is what is learned. Knows no family."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import nn

NetT = TypeVar("NetT", bound=nn.Module)


def rounded(net: NetT) -> NetT:
    """``net`` with bfloat16 copies of all trained weights of modules that compute in the type of their weights.

    All else is not copied but shared: other weights, those that stand still, and buffers, which stay as exact as they
    are. A network without such modules is returned as it is.
    """
    trained = [one for one in weights_to_round(net) if one.requires_grad]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*net.parameters(), *net.buffers()]}
    copies = {id(one): nn.Parameter(one.detach().to(torch.bfloat16)) for one in trained}
    return deepcopy(net, memo | copies) if copies else net


def weights_to_round(net: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of modules in ``net`` that compute in whatever type these have."""
    for module in net.modules():
        if getattr(module, "computes_in_type_of_weights", False):
            yield from module.parameters()
