"""A network that begins with a trained model, or has one as a part that training does not touch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from shared.errors import ModelLoadFailed
from shared.specs import VaeSpec
from shared.specs.spec import Modality, ModelRef
from shared.specs.training import TrainSpec
from tests.engine.conftest import CPU, DATA, batch_at, small_spec
from worker.engine.checkpoint import Checkpoint, write_weights
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.families.family import Batch, DataInfo, Family, Measured, Origin
from worker.kernels.noise import Noise

VAE = FAMILIES["vae"]


class ProbeSpec(TrainSpec):
    """A family of tests: a linear layer on the latents of a trained VAE."""

    modality: ClassVar[Modality] = "image"
    tasks: ClassVar[Mapping[str, frozenset[str]]] = {}
    built_on: ClassVar[Mapping[str, frozenset[str]]] = {"encoder": frozenset({"vae"})}
    family: Literal["probe"] = "probe"
    encoder: ModelRef


class Probe(nn.Module):
    """``encoder`` is the VAE."""

    def __init__(self, data: DataInfo) -> None:
        super().__init__()
        self.encoder = data.models["encoder"].network()
        self.head = nn.Linear(4, 1)

    def forward(self, image: Tensor) -> Tensor:
        mean, _ = self.encoder.encode(image)
        return self.head(mean)


def probe_loss(spec: ProbeSpec, net: Probe, batch: Batch, noise: Noise) -> Measured:
    image = batch["image"].float() / 255
    error = net(image) - image.flatten(1).mean(1, keepdim=True)
    trained = torch.tensor(float(net.encoder.training))
    return Measured(loss=error.square().mean(), values={"encoder_is_trained": trained})


PROBE = Family(spec=ProbeSpec, build=lambda spec, data: Probe(data), losses={"probe": probe_loss}, tasks={})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a VAE after some steps."""
    trainer = Trainer(VAE, small_spec(), DATA, CPU)
    for step in range(4):
        trainer.advance(batch_at(step))
    path = tmp_path_factory.mktemp("vae") / "model.safetensors"
    write_weights(path, trainer.average, {})
    return path


def probe_trainer(trained: Path) -> Trainer[Any, Any]:
    origin = Origin(family="vae", spec=small_spec().model_dump(mode="json"), data=DATA)
    data = DataInfo(shape=DATA.shape, models={"encoder": origin})
    spec = ProbeSpec(dataset="ds_" + "0" * 32, model="probe", encoder="vae@1", steps=8, warmup_steps=0)
    trainer = Trainer(PROBE, spec, data, CPU)
    trainer.begin_with("encoder", trained)
    return trainer


def test_a_fine_tuning_begins_with_the_weights_and_their_average(trained: Path) -> None:
    other = Trainer(VAE, small_spec(seed=5), DATA, CPU)

    other.begin_with("init_from", trained)

    before = Trainer(VAE, small_spec(), DATA, CPU)
    before.begin_with("init_from", trained)
    for mine, theirs in zip(other.net.parameters(), before.average.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_of_another_network_are_refused(trained: Path) -> None:
    wider = Trainer(VAE, small_spec(hidden_dim=16, base_channels=16), DATA, CPU)

    with pytest.raises(ModelLoadFailed):
        wider.begin_with("init_from", trained)


def test_the_part_that_a_network_is_built_on_stays_as_it_was(trained: Path) -> None:
    trainer = probe_trainer(trained)
    encoder = {name: tensor.clone() for name, tensor in trainer.net.encoder.state_dict().items()}
    head = trainer.net.head.weight.clone()

    figures = [trainer.advance(batch_at(step)) for step in range(3)]

    assert all(torch.equal(tensor, encoder[name]) for name, tensor in trainer.net.encoder.state_dict().items())
    assert not torch.equal(trainer.net.head.weight, head)
    assert not any(figure["encoder_is_trained"] for figure in figures)


def test_a_training_on_a_model_is_resumed_without_the_model(trained: Path, tmp_path: Path) -> None:
    trainer = probe_trainer(trained)
    trainer.advance(batch_at(0))
    trainer.checkpoint().write(tmp_path / "half")
    trainer.advance(batch_at(1))

    resumed = Trainer.resume(PROBE, trainer.spec, trainer.data, CPU, Checkpoint.read(tmp_path / "half"))
    resumed.advance(batch_at(1))

    for mine, theirs in zip(resumed.net.state_dict().values(), trainer.net.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_known_of_the_origins_survives_json() -> None:
    origin = Origin(family="vae", spec=small_spec().model_dump(mode="json"), data=DATA)
    data = DataInfo(shape=(1, 12, 12), num_classes=3, models={"encoder": origin})

    read = DataInfo.from_json(data.as_json())

    assert read == data
    assert VaeSpec.model_validate(read.models["encoder"].spec) == small_spec()
