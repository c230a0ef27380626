"""The autoencoder with codes: what each part learns and when, and that a sample is its own."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.specs import VqSpec
from shared.specs.tasks import Encode, Generate, Reconstruct
from worker.engine.sampling import Tile, sample
from worker.engine.training import Trainer, build
from worker.families.family import DataInfo, Draw
from worker.families.vq import FAMILY, Vq, autoencoder_loss, drawn, from_bytes, prior_loss
from worker.kernels.noise import Domain, Noise

CPU = torch.device("cpu")
DATASET = "ds_" + "0" * 32
DIGITS = DataInfo(shape=(1, 16, 16), num_classes=3)
KEYED = Noise.of_step(Domain.TRAINING, 0, 0, range(6), CPU)


def spec_of(**fields: Any) -> VqSpec:
    common = {"family": "vq", "dataset": DATASET, "model": "m", "levels": (4, 4), "codebook_size": 8, "code_dim": 3}
    return VqSpec.model_validate(common | fields)


def images(data: DataInfo, num_images: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, *data.shape), dtype=torch.uint8, generator=generator)


def batch_of(data: DataInfo = DIGITS) -> dict[str, Tensor]:
    return {"image": images(data), "label": torch.arange(6) % 3}


def network(spec: VqSpec, data: DataInfo = DIGITS) -> Vq:
    """Untrained, but with weights that are not zero anywhere, so that everything matters."""
    net = build(FAMILY, spec, data)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        for weight in (net.prior.tokens.weight, net.prior.to_logits.weight, net.autoencoder.to_latent.weight):
            torch.nn.init.normal_(weight, std=1.0)
    return net.requires_grad_(requires_grad=False).eval()


def codebook_of(net: Vq) -> Tensor:
    return net.autoencoder.quantizer.get_buffer("codebook_KD")


def draws_of(indices: Sequence[int], **fields: Any) -> list[Draw[Generate]]:
    request = Generate(task="generate", model="m", seed=5, **fields)
    return [Draw(request=request, index=index) for index in indices]


def generated(net: Vq, spec: VqSpec, draws: list[Draw[Generate]], width: int = 4) -> dict[int, Tensor]:
    tile = Tile(net, FAMILY.tasks["generate"](spec, DIGITS), draws[0], CPU, width)
    return {draw.index: image for draw, image in sample(tile, draws)}


@pytest.mark.parametrize("quantizer", ["fsq", "ema"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (1, 28, 28), (3, 32, 32)])
def test_every_resolution_goes_in_and_comes_out(quantizer: str, shape: tuple[int, ...]) -> None:
    data, spec = DataInfo(shape=shape), spec_of(quantizer=quantizer)
    net = build(FAMILY, spec, data)

    measured = [loss(spec, net, {"image": images(data)}, KEYED) for loss in FAMILY.losses.values()]

    code = net.autoencoder.encode(from_bytes(images(data)))
    assert net.autoencoder.decode(net.autoencoder.quantizer.vectors(code)).shape == (6, *shape)
    assert all(one.loss.isfinite() for one in measured)


def test_an_untrained_prior_takes_all_codes_for_equally_likely() -> None:
    measured = prior_loss(spec_of(), build(FAMILY, spec_of(), DIGITS), batch_of(), KEYED)

    assert measured.loss.item() == pytest.approx(torch.tensor(16.0).log().item(), rel=1e-5)
    assert measured.values["code_bits_per_dim"].item() == pytest.approx(4 * 16 / 256, rel=1e-5)


def test_the_prior_s_loss_is_the_cross_entropy_of_each_code_given_those_before_it() -> None:
    spec = spec_of()
    net, batch = network(spec), batch_of()
    code = net.autoencoder.encode(from_bytes(batch["image"]))

    nats = []
    for place in range(code.shape[1]):
        known = torch.cat((16 + batch["label"][:, None], code[:, :place]), dim=1)
        logs = net.prior(known)[:, -1].log_softmax(1)
        nats.append(-logs.gather(1, code[:, place, None]).mean())

    assert prior_loss(spec, net, batch, KEYED).loss.item() == pytest.approx(torch.stack(nats).mean().item(), rel=1e-4)


@pytest.mark.parametrize("quantizer", ["fsq", "ema"])
def test_each_part_learns_from_its_own_loss_alone(quantizer: str) -> None:
    spec = spec_of(quantizer=quantizer)
    net = network(spec).requires_grad_().train()

    for name, loss in FAMILY.losses.items():
        net.zero_grad()
        loss(spec, net, batch_of(), KEYED).loss.backward()

        learning = {key.partition(".")[0] for key, weight in net.named_parameters() if weight.grad is not None}
        idle = [key for key, weight in net.get_submodule(name).named_parameters() if not weight.grad.any()]
        assert learning == {name}
        assert idle == []


def test_the_prior_rests_until_the_codes_are_worth_learning() -> None:
    spec = spec_of(steps=4, prior_start=0.5, precision="fp32", warmup_steps=0)
    trainer = Trainer(FAMILY, spec, DIGITS, CPU)
    begun = {name: tensor.clone() for name, tensor in trainer.net.prior.named_parameters()}

    moved = []
    for _ in range(4):
        trainer.advance(batch_of())
        moved.append(any((tensor != begun[name]).any() for name, tensor in trainer.net.prior.named_parameters()))

    assert moved == [False, False, True, True]


def test_only_training_moves_the_codebook() -> None:
    spec = spec_of(quantizer="ema")
    net = network(spec)
    before = codebook_of(net).clone()

    autoencoder_loss(spec, net, batch_of(), KEYED)
    assert torch.equal(codebook_of(net), before)

    prior_loss(spec, net.train(), batch_of(), KEYED)
    assert torch.equal(codebook_of(net), before)

    autoencoder_loss(spec, net.train(), batch_of(), KEYED)
    assert not torch.equal(codebook_of(net), before)


def test_the_averaged_weights_come_with_the_codebook() -> None:
    trainer = Trainer(FAMILY, spec_of(quantizer="ema", steps=4, precision="fp32"), DIGITS, CPU)

    trainer.advance(batch_of())

    books = [codebook_of(net) for net in (trainer.net, trainer.average)]
    assert torch.equal(*books)


@pytest.mark.parametrize("quantizer", ["fsq", "ema"])
def test_a_sample_is_the_same_alone_among_strangers_and_in_any_slot(quantizer: str) -> None:
    """Six draws through four slots: the later ones enter while others are underway."""
    spec = spec_of(quantizer=quantizer)
    net = network(spec)

    together = generated(net, spec, draws_of(range(6)))

    assert len({image.numpy().tobytes() for image in together.values()}) == 6
    for index in (0, 3, 5):
        alone = generated(net, spec, draws_of([index]))
        assert torch.equal(alone[index], together[index])


def test_the_prior_depends_on_the_class() -> None:
    spec = spec_of()
    net = network(spec)

    asked = {label: generated(net, spec, draws_of([0], labels=[label]))[0] for label in (0, 1, 2)}
    by_default = generated(net, spec, draws_of([0, 1, 2, 3]))
    for index in (1, 3):
        assert torch.equal(by_default[index], generated(net, spec, draws_of([index], labels=[index % 3]))[index])

    assert not torch.equal(asked[0], asked[1])


def test_a_prior_without_classes_knows_no_labels() -> None:
    spec = spec_of(class_conditional=False)
    net = network(spec)
    batch = batch_of()

    losses = [prior_loss(spec, net, batch | {"label": label}, KEYED).loss for label in (batch["label"], None)]

    assert torch.equal(*losses)


def test_at_temperature_zero_every_code_is_the_likeliest_after_those_before_it() -> None:
    spec = spec_of()
    net = network(spec)
    sampler = FAMILY.tasks["generate"](spec, DIGITS)
    draws = draws_of([0, 1], temperature=0.0)
    state = sampler.start(draws, Noise.of_step(Domain.SAMPLING, 5, 0, range(2), CPU))

    for step in range(sampler.num_steps(draws[0].request)):
        state |= sampler.step(net, state, Noise.of_step(Domain.SAMPLING, 5, step, range(2), CPU))

    tokens = torch.cat((net.first_token(torch.tensor([0, 1]))[:, None], state["code"][:, :-1]), dim=1)
    assert torch.equal(net.prior(tokens).argmax(-1), state["code"])
    assert torch.equal(state["x"], net.autoencoder.decode(net.autoencoder.quantizer.vectors(state["code"])))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_codes_are_drawn_as_often_as_they_are_likely(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    noise = Noise.of_step(Domain.SAMPLING, 0, 0, range(20_000), CPU)

    codes = drawn(logits.expand(20_000, 4), torch.full((20_000,), temperature), noise)

    expected = (logits / temperature).softmax(0)
    assert torch.allclose(codes.bincount(minlength=4) / 20_000, expected, atol=0.015)


def test_a_reconstruction_is_decoded_from_its_codes() -> None:
    spec = spec_of(quantizer="ema")
    net = network(spec)
    request = Reconstruct(task="reconstruct", model="m", dataset=DATASET)
    draws = [Draw(request=request, index=index, inputs={"image": image}) for index, image in enumerate(images(DIGITS))]
    sampler = FAMILY.tasks["reconstruct"](spec, DIGITS)

    state = sampler.step(net, sampler.start(draws, KEYED), KEYED)

    vectors = net.autoencoder.quantizer(net.autoencoder.latents(from_bytes(images(DIGITS)))).vector
    assert torch.allclose(state["x"], net.autoencoder.decode(vectors), atol=1e-5)
    assert sampler.finish(net, state).dtype == torch.uint8


@pytest.mark.parametrize("quantizer", ["fsq", "ema"])
def test_encoding_gives_the_map_of_codes_that_the_evaluation_counts(quantizer: str) -> None:
    spec = spec_of(quantizer=quantizer)
    net = network(spec)
    request = Encode(task="encode", model="m", dataset=DATASET)
    draws = [Draw(request=request, index=index, inputs={"image": image}) for index, image in enumerate(images(DIGITS))]
    sampler = FAMILY.tasks["encode"](spec, DIGITS)

    found = sampler.finish(net, sampler.step(net, sampler.start(draws, KEYED), KEYED))

    score = FAMILY.scores["codebook"]
    assert (found.shape, found.dtype) == ((6, 4, 4), torch.int32)
    assert torch.equal(found.flatten(1).long(), score.values(spec, net, batch_of(), KEYED))
    assert score.num_codes is not None and score.num_codes(spec) == net.autoencoder.quantizer.num_codes


def test_an_evaluation_tells_what_the_codes_of_each_image_cost_under_the_prior() -> None:
    spec = spec_of()
    net, batch = network(spec), batch_of()

    bits = FAMILY.scores["code_bits_per_dim"].values(spec, net, batch, KEYED)

    assert isinstance(bits, Tensor)
    assert bits.std() > 0
    told = prior_loss(spec, net, batch, KEYED).values["code_bits_per_dim"]
    assert bits.mean().item() == pytest.approx(told.item(), rel=1e-5)


def test_every_task_of_the_spec_has_a_sampler() -> None:
    assert FAMILY.tasks.keys() == VqSpec.tasks.keys()
