"""Blocks that are computed again in the backward pass: the same bits, and less that is kept in between."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from shared.specs import DiffusionSpec
from tests.engine.conftest import bars, small_spec
from worker.engine.numerics import exact
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import DataInfo

CPU = torch.device("cpu")


def trainer_of(**fields: Any) -> Trainer[Any, Any]:
    common = {"family": "diffusion", "dataset": "ds_" + "0" * 32, "model": "m", "preset": "xs", "batch_size": 4}
    spec = DiffusionSpec.model_validate({**common, "steps": 8, "warmup_steps": 0, "dropout": 0.3, **fields})
    return Trainer(FAMILIES["diffusion"], spec, DataInfo(shape=(1, 12, 12)), CPU)


def trained(trainer: Trainer[Any, Any]) -> tuple[list[float], dict[str, Tensor], int]:
    """Losses and weights after two steps, and how many bytes the first backward pass found kept for it."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with exact(1):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = [trainer.advance({"image": bars()[:4]})["loss"]]
        losses.append(trainer.advance({"image": bars()[4:8]})["loss"])
    return losses, {name: weight.detach() for name, weight in trainer.net.named_parameters()}, kept


@pytest.mark.parametrize("network", ["unet", "dit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_what_is_computed_again_has_the_same_bits(network: str, precision: str) -> None:
    """Masks of dropout too, which a second forward pass must draw as the first did."""
    losses, weights, kept = trained(trainer_of(network=network, precision=precision))

    again_losses, again_weights, again_kept = trained(trainer_of(network=network, precision=precision, recompute=True))

    assert again_losses == losses
    assert [name for name, weight in weights.items() if not torch.equal(weight, again_weights[name])] == []
    # What the hook sees are the inputs of the blocks and what lies outside of them.
    assert again_kept < 0.6 * kept


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValidationError, match="no blocks"):
        small_spec(recompute=True)
