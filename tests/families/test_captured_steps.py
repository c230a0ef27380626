"""Of every family, steps that a device repeats come to the bits of plain ones, or are not captured."""

from collections.abc import Mapping
from typing import Any, Final

import pytest
import torch

from shared.specs import FAMILIES as SPECS
from shared.specs.training import TrainSpec
from tests.engine.tape import TapeRecorder
from tests.families.on_stand_in import DATA, ENGINE_S, known
from tests.jobs.variants import variants
from worker.engine.capture import Repeats
from worker.engine.captured_steps import CapturedSteps
from worker.engine.numerics import Numerics, exact
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import Batch
from worker.kernels import native
from worker.kernels.noise import Domain, Noise

pytestmark = pytest.mark.slow

CPU: Final = torch.device("cpu")
FP32: Final = Numerics(precision="fp32", channels_last=False, num_threads=1)
LESS_OFTEN: Final[Mapping[str, Mapping[str, Any]]] = {
    "gan": {"burn_in_steps": 0, "critic_steps": 1, "penalty_every": 2},
    "consistency": {"stages": 1},
    "vq": {"prior_start": 0.0},
}
"""What has few steps be enough for two of one kind to be repeated."""
ASK: Final = ("vq-quantizer=ema", "diffusion-autoencoder=vae@1", "diffusion-autoencoder=vq@1")
"""Ways of training that ask the device in each step whether something has begun."""
ELSEWHERE: Final = (*ENGINE_S, "class_conditional", "recompute")


def ways() -> dict[str, dict[str, Any]]:
    """Each family, and each of its own choices, in fp32."""
    found = {name.removesuffix("-fp32"): fields for name, fields in variants() if name.endswith("-fp32")}
    return {
        name: fields
        for name, fields in found.items()
        if fields["family"] in SPECS and not any(f"-{field}=" in name for field in ELSEWHERE)
    }


WAYS: Final = ways()


def batch_of(spec: TrainSpec, step: int) -> Batch:
    noise = Noise.of_step(Domain.ORDER, 0, step, range(spec.batch_size), CPU)
    names = ("image", *spec.further_datasets)
    images = {name: noise.uniform(*DATA.shape, stream=stream) * 256 for stream, name in enumerate(names)}
    labels = (noise.uniform(stream=len(names)) * DATA.num_classes).long()
    return {**{name: image.to(torch.uint8) for name, image in images.items()}, "label": labels}


@pytest.mark.parametrize("name", WAYS)
def test_repeated_steps_come_to_the_bits_of_plain_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_available", lambda: False)  # a tape does not hear what our C++ kernels do
    fields = WAYS[name]
    spec = SPECS[fields["family"]].model_validate(fields | dict(LESS_OFTEN.get(fields["family"], {})))
    recorder = TapeRecorder()
    with exact(1):
        plain, repeated = (Trainer(FAMILIES[fields["family"]], spec, known(spec), CPU, FP32) for _ in range(2))
        repeated.captured = CapturedSteps(Repeats(recorder))
        figures = [
            (plain.advance(batch), repeated.advance(batch)) for batch in (batch_of(spec, step) for step in range(8))
        ]

    assert [one for one, _ in figures] == [other for _, other in figures]
    tensors, others = plain.checkpoint().tensors, repeated.checkpoint().tensors
    assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())
    assert (recorder.num_played == 0) == (name in ASK)
