"""What is done to training images: each alteration by itself against numpy, how often, and that it is keyed."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from shared.specs.augmentation import Augmentation
from tests.engine.conftest import CPU, DATA, bars, batch_at, small_spec
from worker.engine.augmentation import NUM_DRAWS, altered, augmented, moved
from worker.engine.checkpoint import Checkpoint
from worker.engine.evaluation import evaluate
from worker.engine.training import Trainer
from worker.families import FAMILIES
from worker.kernels.noise import Domain, Noise

VAE = FAMILIES["vae"]
EVERYTHING = {"flip": 0.5, "shift": 3, "brightness": 0.3, "contrast": 0.4, "saturation": 0.5}


def pictures(num_images: int, channels: int = 3) -> Tensor:
    chance = np.random.default_rng(0)
    return torch.from_numpy(chance.integers(0, 256, (num_images, channels, 7, 9), np.uint8))


def noise_of(num_images: int, step: int = 0) -> Noise:
    return Noise.of_step(Domain.AUGMENTATION, 1, step, range(num_images), CPU)


def test_images_are_altered_as_numpy_alters_them() -> None:
    """The whole chain, image by image, from the same numbers."""
    images, asked, draws = pictures(40), Augmentation(**EVERYTHING), noise_of(40).uniform(NUM_DRAWS)

    got = altered(images, asked, draws)

    for image, u, result in zip(images.numpy(), draws.double().numpy(), got.numpy(), strict=True):
        expected = image[:, :, ::-1] if u[0] < 0.5 else image
        down, right = int(u[1] * 7) - 3, int(u[2] * 7) - 3
        padded = np.pad(expected, ((0, 0), (3, 3), (3, 3)), mode="reflect")
        x = padded[:, 3 - down : 10 - down, 3 - right : 12 - right].astype(float)
        x = x * (1 + 0.3 * (2 * u[3] - 1))
        x = x.mean() + (x - x.mean()) * (1 + 0.4 * (2 * u[4] - 1))
        x = x.mean(0) + (x - x.mean(0)) * (1 + 0.5 * (2 * u[5] - 1))
        np.testing.assert_array_equal(result, x.round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_images_smaller_than_their_shift_are_mirrored_again_and_again(size: int) -> None:
    row = torch.arange(size, dtype=torch.uint8).view(1, 1, 1, size)

    got = moved(row, 3, torch.tensor([-7]))

    assert got.flatten().numpy().tolist() == np.pad(np.arange(size), (0, 7), mode="reflect")[7:].tolist()


def test_as_many_images_are_mirrored_as_was_asked_for() -> None:
    images = pictures(2000)

    got = altered(images, Augmentation(flip=0.3), noise_of(2000).uniform(NUM_DRAWS))

    is_mirrored = (got == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(got[~is_mirrored], images[~is_mirrored])
    # Four standard deviations of a share of 2000.
    assert is_mirrored.double().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 2000) ** 0.5)


def test_shifts_in_all_directions_are_equally_likely() -> None:
    image = torch.zeros(4000, 1, 9, 9, dtype=torch.uint8)
    image[:, :, 4, 4] = 1

    got = altered(image, Augmentation(shift=2), noise_of(4000).uniform(NUM_DRAWS))

    counts = got.sum((0, 1))[2:7, 2:7]
    assert counts.sum() == 4000
    assert (counts - 160).abs().max() < 4 * 160**0.5


def test_grey_images_have_no_saturation() -> None:
    images = pictures(5, channels=1)

    assert torch.equal(altered(images, Augmentation(saturation=1), noise_of(5).uniform(NUM_DRAWS)), images)


def test_labels_and_codes_are_left_alone() -> None:
    batch = {"image": pictures(8), "label": torch.arange(8), "other": pictures(8)}

    got = augmented(batch, Augmentation(flip=0.5), noise_of(8))

    assert torch.equal(got["label"], batch["label"])
    assert not torch.equal(got["image"], batch["image"])
    assert not torch.equal(got["image"], got["other"])


def test_nothing_is_altered_unless_asked_for() -> None:
    batch = batch_at(0)

    assert augmented(batch, Augmentation(), noise_of(16)) is batch


def trainer_of(**fields: Any) -> Trainer[Any, Any]:
    return Trainer(VAE, small_spec(network="mlp", precision="fp32", **fields), DATA, CPU)


def weights(trainer: Trainer[Any, Any], to: int) -> dict[str, Tensor]:
    while trainer.step < to:
        trainer.advance(batch_at(trainer.step))
    return {name: tensor.clone() for name, tensor in trainer.checkpoint().tensors.items()}


def test_a_resumed_training_sees_the_same_images() -> None:
    straight = weights(trainer_of(augmentation=EVERYTHING), to=6)
    stopped = trainer_of(augmentation=EVERYTHING)
    weights(stopped, to=3)

    checkpoint: Checkpoint = stopped.checkpoint()
    resumed = weights(Trainer.resume(VAE, stopped.spec, DATA, CPU, checkpoint), to=6)

    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not torch.equal(straight["net.encoder.1.weight"], weights(trainer_of(), to=6)["net.encoder.1.weight"])


def test_every_step_alters_images_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    trainer = trainer_of(augmentation={"shift": 3})
    place = trainer.place
    monkeypatch.setattr(trainer, "place", lambda batch: place(seen.append(batch["image"]) or batch))

    for _ in range(2):
        trainer.advance(batch_at(0))

    assert not torch.equal(seen[0], seen[1])


def test_images_are_the_same_however_small_the_pieces_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[Tensor]] = {16: [], 5: []}
    for size, pieces in seen.items():
        trainer = trainer_of(augmentation=EVERYTHING)
        trainer.numerics = trainer.numerics.halved(2 * size, 0)
        place = trainer.place
        monkeypatch.setattr(
            trainer, "place", lambda batch, place=place, into=pieces: place(into.append(batch["image"]) or batch)
        )
        trainer.advance(batch_at(0))

    assert [len(pieces) for pieces in seen.values()] == [1, 4]
    assert torch.equal(torch.cat(seen[16]), torch.cat(seen[5]))


def test_measuring_alters_nothing() -> None:
    plain, altering = trainer_of(), trainer_of(augmentation=EVERYTHING)

    assert evaluate(plain, [{"image": bars()}]) == evaluate(altering, [{"image": bars()}])


@pytest.mark.parametrize("fields", [{"flip": 1.5}, {"shift": -1}, {"brightness": 2}, {"crop": 3}])
def test_what_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        small_spec(augmentation=fields)
