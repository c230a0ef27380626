"""Augmentation that a diffusion network is told of: what it does to images, how often, and that samples go without."""

from math import cos, pi, sin
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.specs.consistency import ConsistencySpec
from shared.specs.diffusion import DiffusionSpec
from tests.families.test_diffusers_layout import read
from worker.engine.training import Trainer, build
from worker.families.consistency import FAMILY as CONSISTENCY
from worker.families.diffusion import FAMILY, loss
from worker.families.family import DataInfo, Origin
from worker.families.nets.diffusers_layout import write_folder
from worker.families.nets.nonleaky import NUM_TOLD, SCALE, SHIFT, augmented, rotation, scaling, shift, warped
from worker.kernels.noise import Domain, Noise

CPU = torch.device("cpu")
LAST = {"unet": "conv_out.weight", "dit": "patch_out.weight"}
DATA = DataInfo(shape=(1, 8, 8), num_classes=4)


def spec_of(**fields: Any) -> DiffusionSpec:
    return DiffusionSpec(
        family="diffusion", dataset="ds_" + "0" * 32, model="m", steps=4, batch_size=6, precision="fp32", **fields
    )


def noise_of(num_images: int, step: int = 0) -> Noise:
    return Noise.of_step(Domain.TRAINING, 3, step, range(num_images), CPU)


def pictures(num_images: int, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(num_images, 1, height, width, generator=generator, dtype=torch.float64) * 2 - 1


def batch_of(num_images: int) -> dict[str, Tensor]:
    image = ((pictures(num_images) + 1) * 127.5).round().to(torch.uint8)
    return {"image": image, "label": torch.arange(num_images) % 4}


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_flips_and_right_angles_move_whole_pixels() -> None:
    x = pictures(1)

    assert torch.allclose(warped(x, scaling(number(-1), number(1))), x.flip(-1))
    assert torch.allclose(warped(x, scaling(number(1), number(-1))), x.flip(-2))
    # From the x axis to the y axis, which points down: clockwise.
    assert torch.allclose(warped(x, rotation(number(pi / 2))), x.rot90(-1, (2, 3)))


def test_what_comes_in_is_the_image_mirrored_at_its_edge() -> None:
    x = pictures(1, 6, 9)

    moved = warped(x, shift(number(2), number(0)))

    assert torch.allclose(moved, torch.cat((x[..., :2].flip(-1), x[..., :-2]), dim=-1))


def test_points_go_where_the_matrix_says() -> None:
    """A ramp stays one, and its value at a point is that of where the point came from."""
    y, x = torch.meshgrid(torch.arange(11.0) - 5, torch.arange(13.0) - 6, indexing="ij")
    ramp = (0.3 * x - 0.2 * y).double()[None, None]
    matrix = shift(number(0.7), number(-0.4)) @ rotation(number(0.3)) @ scaling(number(1.2), number(1.1))

    got = warped(ramp, matrix)

    # By hand, undone from the last to the first.
    x_1, y_1 = x.double() - 0.7, y.double() + 0.4
    x_2, y_2 = cos(0.3) * x_1 + sin(0.3) * y_1, -sin(0.3) * x_1 + cos(0.3) * y_1
    expected = 0.3 * x_2 / 1.2 - 0.2 * y_2 / 1.1
    assert torch.allclose(got[0, 0, 3:-3, 3:-3], expected[3:-3, 3:-3])


def test_images_that_nothing_is_told_of_are_untouched_to_the_bit() -> None:
    x = pictures(2000)

    got, told = augmented(x, noise_of(2000), 0.15)

    assert told is not None and told.shape == (2000, NUM_TOLD)
    is_plain = (told == 0).all(1)
    assert torch.equal(got[is_plain], x[is_plain])
    assert (got[~is_plain] != x[~is_plain]).flatten(1).any(1).all()
    # Four ways happen with the probability, and the two flips with half of it; four standard deviations.
    share = 0.85**4 * 0.925**2
    assert is_plain.double().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)


def test_what_is_told_is_what_was_done() -> None:
    """Every image on its own, undone by what the network was told of it."""
    x = pictures(300)

    got, told = augmented(x, noise_of(300), 0.3)

    assert told is not None
    only_mirrored = (told[:, 0] == 1) & (told[:, 1:] == 0).all(1)
    only_turned = (told[:, 4] != 0) & (told[:, :3] == 0).all(1) & (told[:, 5:] == 0).all(1)
    only_moved = (told[:, 7] != 0) & (told[:, :7] == 0).all(1)
    assert min(only_mirrored.sum(), only_turned.sum(), only_moved.sum()) > 3
    assert torch.allclose(got[only_mirrored], x[only_mirrored].flip(-1))
    angle = torch.atan2(told[only_turned, 4], told[only_turned, 3] + 1).double()
    assert torch.allclose(got[only_turned], warped(x[only_turned], rotation(-angle)), atol=1e-5)
    right, down = told[only_moved, 7:].double().unbind(1)
    placed = shift(SHIFT * 8 * right, SHIFT * 8 * down)
    assert torch.allclose(got[only_moved], warped(x[only_moved], placed), atol=1e-5)


def test_sizes_are_told_as_logarithms_and_stretches_by_their_axis() -> None:
    """As in the paper, a stretch along an axis and the shrinking along it by as much are told alike."""
    x = pictures(600)

    got, told = augmented(x, noise_of(600), 0.3)

    assert told is not None
    only_scaled = (told[:, 2] != 0) & (told[:, :2] == 0).all(1) & (told[:, 3:] == 0).all(1)
    only_stretched = (told[:, 5] != 0) & (told[:, :5] == 0).all(1) & (told[:, 7:] == 0).all(1)
    assert min(only_scaled.sum(), only_stretched.sum()) > 6
    size = (SCALE * told[only_scaled, 2].double()).exp()
    assert torch.allclose(got[only_scaled], warped(x[only_scaled], scaling(size, size)), atol=1e-5)
    along, across = told[only_stretched, 5:7].double().unbind(1)
    turn, back = rotation(torch.atan2(across, along)), rotation(-torch.atan2(across, along))
    size = (SCALE * torch.hypot(along, across)).exp()
    longer, shorter = (
        warped(x[only_stretched], turn @ scaling(by, 1 / by) @ back).sub(got[only_stretched]).abs().amax((1, 2, 3))
        for by in (size, 1 / size)
    )
    assert torch.minimum(longer, shorter).max() < 1e-5
    assert (longer < 1e-5).any() and (shorter < 1e-5).any()


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    x, noise = pictures(9), [Noise.of_step(Domain.TRAINING, 3, 0, rows, CPU) for rows in (range(4), range(4, 9))]

    whole, _ = augmented(x, noise_of(9), 0.5)

    assert torch.equal(whole, torch.cat([augmented(x[:4], noise[0], 0.5)[0], augmented(x[4:], noise[1], 0.5)[0]]))


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_without_augmentation_the_loss_is_what_it_was_to_the_bit(network: str) -> None:
    """The network learns no less: what it is told of images as they are adds nothing."""
    plain, told = (build(FAMILY, spec_of(network=network, augment=p), DATA) for p in (0.0, 1e-7))
    batch, noise = batch_of(6), noise_of(6)

    assert plain.state_dict().keys() < told.state_dict().keys()
    torch.nn.init.normal_(told.network.get_parameter("augmentation_embedding.weight"))
    for net in (plain, told):  # whose first output is zero whatever it hears
        torch.nn.init.ones_(net.network.get_parameter(LAST[network]))
    expected = loss(spec_of(network=network), plain.train(), batch, noise).loss
    assert torch.equal(loss(spec_of(network=network, augment=1e-7), told.train(), batch, noise).loss, expected)
    assert torch.equal(loss(spec_of(network=network, augment=1.0), told.eval(), batch, noise).loss, expected)
    assert not torch.equal(loss(spec_of(network=network, augment=1.0), told.train(), batch, noise).loss, expected)


def test_the_network_hears_of_it_only_while_it_is_told() -> None:
    network = build(FAMILY, spec_of(augment=0.5), DATA).network
    torch.nn.init.normal_(network.get_parameter("augmentation_embedding.weight"))
    t, labels = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    before = network.embed(t, labels)

    with network.told(torch.ones(2, NUM_TOLD)):
        during = network.embed(t, labels)

    assert not torch.equal(before, during)
    assert torch.equal(network.embed(t, labels), before)


def test_a_resumed_training_is_augmented_alike() -> None:
    def advanced(trainer: Trainer[Any, Any], to: int) -> Trainer[Any, Any]:
        while trainer.step < to:
            trainer.advance(batch_of(6))
        return trainer

    straight = advanced(Trainer(FAMILY, spec_of(augment=0.5), DATA, CPU), to=3)
    checkpoint = advanced(Trainer(FAMILY, spec_of(augment=0.5), DATA, CPU), to=2).checkpoint()
    resumed = advanced(Trainer.resume(FAMILY, straight.spec, DATA, CPU, checkpoint), to=3)

    weights = straight.net.state_dict()
    assert all(torch.equal(weights[name], one) for name, one in resumed.net.state_dict().items())
    assert weights["network.augmentation_embedding.weight"].abs().sum() > 0


def test_an_exported_network_draws_the_same(tmp_path: Path) -> None:
    net = build(FAMILY, spec_of(preset="s", objective="v", augment=0.5), DATA).network.eval()
    torch.nn.init.normal_(net.get_parameter("augmentation_embedding.weight"))

    write_folder(tmp_path, net, DATA.shape, {})

    x, t, labels = pictures(1).float(), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(read(tmp_path)(x, t, labels), net(x, t, labels))


def test_a_model_that_was_told_can_be_tuned_without() -> None:
    origin = Origin(family="diffusion", spec=spec_of(augment=0.5).model_dump(mode="json"), data=DATA)
    data = DataInfo(shape=DATA.shape, num_classes=4, models={"init_from": origin})
    fields = {"family": "consistency", "dataset": "ds_" + "0" * 32, "model": "m", "init_from": "origin@1"}
    trainer = Trainer(CONSISTENCY, ConsistencySpec.model_validate(fields), data, CPU)

    trainer.advance(batch_of(6))

    assert not trainer.net.network.get_parameter("augmentation_embedding.weight").any()
