"""Networks that are built without drawing their first weights, and filled from a file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.test_invariance import drawing, known
from worker.engine.checkpoint import load_weights, tensors_of, undrawn, write_weights
from worker.engine.training import build
from worker.families import FAMILIES


@pytest.mark.parametrize("spec", [*drawing()])
def test_nothing_is_left_of_what_was_not_drawn(spec: Any, tmp_path: Path) -> None:
    """Every weight and every buffer, those that no file holds included, is that of the network that was written."""
    family, path = FAMILIES[spec.model_dump()["family"]], tmp_path / "model.safetensors"
    written = build(family, spec, known(spec))
    write_weights(path, written, {})

    with undrawn():
        loaded = build(family, spec, known(spec))
    load_weights(path, loaded)

    expected = tensors_of(written)
    assert tensors_of(loaded).keys() == expected.keys()
    assert [name for name, tensor in tensors_of(loaded).items() if not torch.equal(tensor, expected[name])] == []


def test_first_weights_are_not_drawn() -> None:
    with undrawn(), torch.random.fork_rng():
        before = torch.random.get_rng_state()
        torch.nn.Linear(64, 64)
        torch.nn.init.trunc_normal_(torch.empty(8))

        assert torch.equal(torch.random.get_rng_state(), before)
