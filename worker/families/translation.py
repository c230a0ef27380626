"""Image-to-image translation between two sets of images without pairs: networks, losses, sampler.

Objectives: contrastive (CUT, Park et al., 2020, arXiv 2007.15651) and cycle (CycleGAN, Zhu et al., 2017,
arXiv 1703.10593), both with the least-squares adversarial loss (Mao et al., 2016, arXiv 1611.04076). x are images of
``dataset``, y of ``target_dataset``.

Shape suffixes: B = batch, S = slots, C = channels, H, W = height and width, h, w = of a map, F = features, N = places,
D = dimensions of a direction.
"""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.specs.tasks import Translate
from shared.specs.translation import TranslationSpec
from worker.families.family import Batch, DataInfo, Draw, Family, Measured, Score, SlotState
from worker.families.nets.translator import PatchDiscriminator, PlaceHead, Translator
from worker.kernels.noise import Noise

# Networks ----------------------------------------------------------------------------------------


class Translators(nn.Module):
    """``to_target(x)``, and what holds it to its source: the way back, or the heads that recognise a place."""

    def __init__(self, spec: TranslationSpec, data: DataInfo) -> None:
        super().__init__()
        sizes = {"base_channels": spec.base_channels, "num_blocks": spec.num_blocks}
        self.to_target = Translator(data.shape, **sizes)
        if spec.knows_both_ways:
            self.to_source = Translator(data.shape, **sizes)
        else:
            self.heads = nn.ModuleList(PlaceHead(width, spec.head_dim) for width in self.to_target.map_widths)


class Critics(nn.Module):
    """Who judges whether a patch has the look of the ``target``, and where both ways are learned of the ``source``."""

    def __init__(self, spec: TranslationSpec, data: DataInfo) -> None:
        super().__init__()
        sizes = {"base_channels": spec.base_channels, "num_layers": spec.critic_layers}
        self.target = PatchDiscriminator(data.shape, **sizes)
        if spec.knows_both_ways:
            self.source = PatchDiscriminator(data.shape, **sizes)


class Translation(nn.Module):
    """Both parts."""

    def __init__(self, discriminator: Critics, generator: Translators) -> None:
        super().__init__()
        self.discriminator, self.generator = discriminator, generator


def build(spec: TranslationSpec, data: DataInfo) -> Translation:
    """Networks for images of ``data.shape``."""
    return Translation(Critics(spec, data), Translators(spec, data))


# Losses ------------------------------------------------------------------------------------------


def from_bytes(image_BCHW: Tensor) -> Tensor:
    """Bytes as float32 in [-1, 1]."""
    return image_BCHW.float() / 127.5 - 1


def as_bytes(x_BCHW: Tensor) -> Tensor:
    """The inverse."""
    return ((x_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def distance_to(goal: float, logit_B1hw: Tensor) -> Tensor:
    """Mean square distance of the logits from what they should be: 1 for real, 0 for fake (Mao et al.)."""
    return (logit_B1hw.float() - goal).square().mean()


def judgement(critic: nn.Module, real_BCHW: Tensor, fake_BCHW: Tensor) -> Tensor:
    """What a critic descends on: half the sum of both distances, as in both papers' experiments."""
    return (distance_to(1, critic(real_BCHW)) + distance_to(0, critic(fake_BCHW))) / 2


def discriminator_loss(spec: TranslationSpec, net: Translation, batch: Batch, _noise: Noise) -> Measured:
    """What the critics descend on; the translators stand still."""
    x_BCHW, y_BCHW = from_bytes(batch["image"]), from_bytes(batch["target_dataset"])
    translators, critics = net.generator, net.discriminator
    with torch.no_grad():
        fake_y_BCHW = translators.to_target(x_BCHW)
        fake_x_BCHW = translators.to_source(y_BCHW) if spec.knows_both_ways else None
    loss = judgement(critics.target, y_BCHW, fake_y_BCHW)
    if fake_x_BCHW is not None:
        loss = loss + judgement(critics.source, x_BCHW, fake_x_BCHW)
    return Measured(loss=loss, values={})


def patch_nce(query_BND: Tensor, key_BND: Tensor, temperature: float) -> Tensor:
    """How badly each place of an image is recognised among the others of the same image: cross entropy in nats
    (Park et al., equation 3). The keys are goals, which no gradient moves."""
    similarity_BNN = query_BND @ key_BND.detach().mT / temperature
    places_BN = torch.arange(query_BND.shape[1], device=query_BND.device).expand(len(query_BND), -1)
    return F.cross_entropy(similarity_BNN.flatten(0, 1), places_BN.flatten())


def places(noise: Noise, num_all: int, num: int, stream: int) -> Tensor:
    """Different places of each image in a random order, int64 ``(B, N)``: as many as wanted, or all there are."""
    return noise.uniform(num_all, stream=stream).argsort(dim=1, stable=True)[:, :num]


def directions(heads: nn.ModuleList, maps: Sequence[Tensor], at: Sequence[Tensor]) -> list[Tensor]:
    """What the heads say of the places ``at`` of each map, ``(B, N, D)`` each."""
    told: list[Tensor] = []
    for head, map_BFhw, place_BN in zip(heads, maps, at, strict=True):
        x_BNF = map_BFhw.flatten(2).mT
        told.append(head(x_BNF.gather(1, place_BN[..., None].expand(-1, -1, x_BNF.shape[2]))))
    return told


class Recognition:
    """PatchNCE between images and their translations, over several maps of the translator (Park et al., equation 4)."""

    def __init__(self, spec: TranslationSpec, translators: Translators, noise: Noise) -> None:
        self.spec, self.translators, self.noise = spec, translators, noise

    def loss(self, source_maps: Sequence[Tensor], made_BCHW: Tensor) -> Tensor:
        """The mean over the maps, each at places of its own."""
        sizes = [one.shape[2] * one.shape[3] for one in source_maps]
        at = [places(self.noise, size, self.spec.num_patches, stream) for stream, size in enumerate(sizes)]
        heads, made_maps = self.translators.heads, self.translators.to_target.encode(made_BCHW)
        queries, keys = directions(heads, made_maps, at), directions(heads, source_maps, at)
        found = [patch_nce(query, key, self.spec.temperature) for query, key in zip(queries, keys, strict=True)]
        return torch.stack(found).mean()


def contrastive_loss(spec: TranslationSpec, net: Translation, batch: Batch, noise: Noise) -> Measured:
    """The adversarial loss, PatchNCE of x and, as identity, of y (Park et al., equation 5)."""
    translator, recognition = net.generator.to_target, Recognition(spec, net.generator, noise)
    x_maps, y_maps = (translator.encode(from_bytes(batch[name])) for name in ("image", "target_dataset"))
    fake_BCHW, same_BCHW = translator.decode(x_maps[-1]), translator.decode(y_maps[-1])
    values = {
        "adversarial": distance_to(1, net.discriminator.target(fake_BCHW)),
        "contrastive": recognition.loss(x_maps, fake_BCHW),
        "identity": recognition.loss(y_maps, same_BCHW),
    }
    held = spec.contrastive_weight * values["contrastive"] + spec.identity_weight * values["identity"]
    return Measured(loss=values["adversarial"] + held, values=values)


def mean_distance(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (a_BCHW - b_BCHW).abs().mean()


def cycle_loss(spec: TranslationSpec, net: Translation, batch: Batch) -> Measured:
    """The adversarial losses, both cycles and both identities (Zhu et al., equations 2 and 3, section 5.2)."""
    x_BCHW, y_BCHW = from_bytes(batch["image"]), from_bytes(batch["target_dataset"])
    to_target, to_source, critics = net.generator.to_target, net.generator.to_source, net.discriminator
    fake_y_BCHW, fake_x_BCHW = to_target(x_BCHW), to_source(y_BCHW)
    values = {
        "adversarial": distance_to(1, critics.target(fake_y_BCHW)) + distance_to(1, critics.source(fake_x_BCHW)),
        "cycle": mean_distance(to_source(fake_y_BCHW), x_BCHW) + mean_distance(to_target(fake_x_BCHW), y_BCHW),
        "identity": mean_distance(to_target(y_BCHW), y_BCHW) + mean_distance(to_source(x_BCHW), x_BCHW),
    }
    held = spec.cycle_weight * values["cycle"] + spec.identity_weight * values["identity"]
    return Measured(loss=values["adversarial"] + held, values=values)


def generator_loss(spec: TranslationSpec, net: Translation, batch: Batch, noise: Noise) -> Measured:
    """What the translators descend on; the critics stand still."""
    return cycle_loss(spec, net, batch) if spec.knows_both_ways else contrastive_loss(spec, net, batch, noise)


# Scores ------------------------------------------------------------------------------------------


def cycle_error(_spec: TranslationSpec, net: Translation, batch: Batch, _noise: Noise) -> Tensor:
    """Mean absolute difference of each image of ``dataset`` from its way there and back, in grey levels ``(B,)``."""
    x_BCHW = from_bytes(batch["image"])
    back_BCHW = net.generator.to_source(net.generator.to_target(x_BCHW))
    return 127.5 * (back_BCHW - x_BCHW).abs().flatten(1).mean(1)


# Sampler -----------------------------------------------------------------------------------------


class Translating:
    """One step, in which images ``x`` get the other look; ``back`` where the way to the source is asked."""

    def __init__(self, spec: TranslationSpec, data: DataInfo) -> None:
        self.spec = spec

    def num_steps(self, request: object) -> int:
        return 1

    def start(self, draws: Sequence[Draw[Translate]], noise: Noise) -> SlotState:
        images = [draw.inputs["image"] for draw in draws if draw.inputs is not None]
        back = [draw.request.direction == "to_source" for draw in draws]
        x_SCHW = from_bytes(torch.stack(images).to(noise.device))
        return {"x": x_SCHW, "back": torch.tensor(back, device=noise.device)}

    def step(self, net: Translation, state: SlotState, noise: Noise) -> SlotState:
        """Both ways of all slots where the model knows both: who shares a batch must not decide what is computed."""
        made_SCHW = net.generator.to_target(state["x"])
        if self.spec.knows_both_ways:
            back_SCHW = net.generator.to_source(state["x"])
            made_SCHW = torch.where(state["back"][:, None, None, None], back_SCHW, made_SCHW)
        return state | {"x": made_SCHW}

    def finish(self, net: Translation, state: SlotState) -> Tensor:
        return as_bytes(state["x"])


FAMILY: Final = Family(
    spec=TranslationSpec,
    build=build,
    losses={"discriminator": discriminator_loss, "generator": generator_loss},
    tasks={"translate": Translating},
    scores={"cycle_error": Score(values=cycle_error)},
)
