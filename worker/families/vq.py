"""Autoencoder with discrete codes (van den Oord et al., 2017, arXiv 1711.00937; Mentzer et al., 2023, arXiv 2309.15505)
and a causal transformer as the prior over them: networks, losses, samplers.

Shape suffixes: B = batch, S = slots, C = channels, H, W = height and width of an image, h, w = of the map of codes,
T = h w codes in reading order, D = dimensions of a code's vector, K = codes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, prod
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.specs.tasks import Encode, Generate, Reconstruct
from shared.specs.vq import VqSpec
from worker.families.family import Batch, DataInfo, Draw, Family, Measured, Score, SlotState
from worker.families.nets.causal_transformer import CausalTransformer, TransformerLayout
from worker.families.nets.halving import Doubling, Halving, map_shape
from worker.families.nets.quantizers import EmaCodebook, Fsq, usage
from worker.kernels.noise import Noise


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a preset stands for."""

    base_channels: int
    """Of the autoencoder after the first halving, doubled at each further one."""
    prior: TransformerLayout


PRESETS: Final[Mapping[str, Preset]] = {
    "xs": Preset(base_channels=32, prior=TransformerLayout(width=128, depth=4, num_heads=4)),
    "s": Preset(base_channels=64, prior=TransformerLayout(width=256, depth=8, num_heads=4)),
    "b": Preset(base_channels=128, prior=TransformerLayout(width=512, depth=12, num_heads=8)),
}

# Networks ----------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Images to a map of codes and back."""

    def __init__(self, spec: VqSpec, data: DataInfo) -> None:
        super().__init__()
        coder = (data.shape, spec.halvings, PRESETS[spec.preset].base_channels)
        num_features, self.height, self.width = map_shape(*coder)
        self.quantizer = quantizer(spec)
        self.encoder = Halving(*coder)
        self.to_latent = nn.Conv2d(num_features, self.quantizer.dim, 1)
        self.from_latent = nn.Conv2d(self.quantizer.dim, num_features, 3, padding=1)
        self.decoder = Doubling(*coder)

    def latents(self, x_BCHW: Tensor) -> Tensor:
        """What is quantised, ``(B, T, D)``."""
        return self.to_latent(self.encoder(x_BCHW)).flatten(2).transpose(1, 2)

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Codes of images in [-1, 1], int64 ``(B, T)``."""
        return self.quantizer(self.latents(x_BCHW)).code

    def decode(self, vector_BTD: Tensor) -> Tensor:
        """Images from their codes' vectors, float32 ``(B, C, H, W)``, about [-1, 1]."""
        map_BDhw = vector_BTD.transpose(1, 2).unflatten(2, (self.height, self.width))
        return self.decoder(self.from_latent(map_BDhw)).float()


def quantizer(spec: VqSpec) -> Fsq | EmaCodebook:
    """The way of quantising that ``spec`` asks for."""
    if spec.quantizer == "fsq":
        return Fsq(spec.levels)
    return EmaCodebook(
        spec.codebook_size,
        spec.code_dim,
        decay=spec.codebook_decay,
        commitment=spec.commitment,
        dead_below=spec.dead_below,
    )


class Vq(nn.Module):
    """The autoencoder and the prior over its codes, which are trained as parts of their own."""

    def __init__(self, spec: VqSpec, data: DataInfo) -> None:
        super().__init__()
        self.num_classes = num_classes(spec, data)
        self.autoencoder = Autoencoder(spec, data)
        num_codes = self.autoencoder.quantizer.num_codes
        self.prior = CausalTransformer(
            PRESETS[spec.preset].prior,
            num_inputs=num_codes + max(1, self.num_classes),
            num_outputs=num_codes,
            num_tokens=self.autoencoder.height * self.autoencoder.width,
        )
        self.latent_shape = (self.autoencoder.quantizer.dim, self.autoencoder.height, self.autoencoder.width)

    def first_token(self, label_B: Tensor) -> Tensor:
        """The token that a sequence of codes begins with: one per class, 0 where there are none."""
        return self.autoencoder.quantizer.num_codes + label_B

    # For models that are built on this one (``worker.families.nets.latents``).

    def latent_of(self, image_BCHW: Tensor) -> Tensor:
        """What is quantised of bytes, ``(B, D, h, w)``."""
        latent_BDT = self.autoencoder.latents(from_bytes(image_BCHW)).transpose(1, 2)
        return latent_BDT.unflatten(2, self.latent_shape[1:]).float()

    def image_of(self, latent_BDhw: Tensor) -> Tensor:
        """Images, about [-1, 1], of the codes that are nearest."""
        latent_BTD = latent_BDhw.flatten(2).transpose(1, 2)
        return self.autoencoder.decode(self.autoencoder.quantizer(latent_BTD).vector)


def code_map(spec: VqSpec, data: DataInfo) -> tuple[int, int]:
    """Height and width of the map of codes."""
    return map_shape(data.shape, spec.halvings, PRESETS[spec.preset].base_channels)[1:]


def num_classes(spec: VqSpec, data: DataInfo) -> int:
    """Classes that the prior is told."""
    return data.num_classes if spec.class_conditional else 0


# Losses ------------------------------------------------------------------------------------------


def from_bytes(image_BCHW: Tensor) -> Tensor:
    """Bytes as float32 in [-1, 1]."""
    return image_BCHW.float() / 127.5 - 1


def autoencoder_loss(_spec: VqSpec, net: Vq, batch: Batch, noise: Noise) -> Measured:
    """Mean square error and commitment (equation 3 of VQ-VAE, its codebook by moving averages)."""
    x_BCHW, autoencoder = from_bytes(batch["image"]), net.autoencoder
    z_BTD = autoencoder.latents(x_BCHW)
    if net.training:
        autoencoder.quantizer.learn(z_BTD.flatten(0, 1), noise)
    quantized = autoencoder.quantizer(z_BTD)
    reconstruction = F.mse_loss(autoencoder.decode(quantized.vector), x_BCHW)
    perplexity, used = usage(quantized.code, autoencoder.quantizer.num_codes)
    values = {"reconstruction": reconstruction, "perplexity": perplexity, "usage": used}
    return Measured(loss=reconstruction + quantized.commitment, values=values)


def predicted(net: Vq, batch: Batch) -> tuple[Tensor, Tensor]:
    """The prior's logits of each code of images ``(B, T, K)``, and the codes, int64 ``(B, T)``."""
    with torch.no_grad():
        code_BT = net.autoencoder.encode(from_bytes(batch["image"]))
    label_B = batch["label"] if net.num_classes else torch.zeros_like(code_BT[:, 0])
    token_BT = torch.cat((net.first_token(label_B)[:, None], code_BT[:, :-1]), dim=1)
    return net.prior(token_BT), code_BT


def prior_loss(_spec: VqSpec, net: Vq, batch: Batch, _noise: Noise) -> Measured:
    """Cross entropy in nats per code, of the codes as the autoencoder has them now."""
    logits_BTK, code_BT = predicted(net, batch)
    nats = F.cross_entropy(logits_BTK.flatten(0, 1), code_BT.flatten())
    bits = nats * code_BT.shape[1] / (log(2) * prod(batch["image"].shape[1:]))
    return Measured(loss=nats, values={"nats_per_code": nats, "code_bits_per_dim": bits})


# Scores ------------------------------------------------------------------------------------------


def codes(_spec: VqSpec, net: Vq, batch: Batch, _noise: Noise) -> Tensor:
    """Codes of images, int64 ``(B, T)``."""
    return net.autoencoder.encode(from_bytes(batch["image"]))


def code_bits_per_dim(_spec: VqSpec, net: Vq, batch: Batch, _noise: Noise) -> Tensor:
    """What the codes of an image cost under the prior, in bits per byte of the image ``(B,)``.

    No bound of what its bytes cost, which codes do not tell.
    """
    logits_BTK, code_BT = predicted(net, batch)
    nats_BT = F.cross_entropy(logits_BTK.float().transpose(1, 2), code_BT, reduction="none")
    return nats_BT.sum(1) / (log(2) * prod(batch["image"].shape[1:]))


def num_codes(spec: VqSpec) -> int:
    """Size of the codebook."""
    return prod(spec.levels) if spec.quantizer == "fsq" else spec.codebook_size


# Samplers ----------------------------------------------------------------------------------------


class Decoding:
    """What both samplers share: images are finished as bytes."""

    def __init__(self, spec: VqSpec, data: DataInfo) -> None:
        self.spec, self.data = spec, data

    def finish(self, net: Vq, state: SlotState) -> Tensor:
        return ((state["x"].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class FromPrior(Decoding):
    """Draws one code per step, in reading order, and then decodes them."""

    def __init__(self, spec: VqSpec, data: DataInfo) -> None:
        super().__init__(spec, data)
        self.num_codes = prod(code_map(spec, data))

    def num_steps(self, request: object) -> int:
        return self.num_codes

    def start(self, draws: Sequence[Draw[Generate]], noise: Noise) -> SlotState:
        classes = range(max(1, num_classes(self.spec, self.data)))
        labels = [draw.request.labels or classes for draw in draws]
        chosen = [known[draw.index % len(known)] for known, draw in zip(labels, draws, strict=True)]
        layout = PRESETS[self.spec.preset].prior
        return {
            "label": torch.tensor(chosen, device=noise.device),
            "temperature": torch.tensor([draw.request.temperature for draw in draws], device=noise.device),
            "code": torch.zeros(len(draws), self.num_codes, dtype=torch.int64, device=noise.device),
            "cache": layout.empty_cache(len(draws), self.num_codes, noise.device),
            "x": torch.zeros(len(draws), *self.data.shape, device=noise.device),
        }

    def step(self, net: Vq, state: SlotState, noise: Noise) -> SlotState:
        """One more code, of those that the prior makes likely."""
        place_S, code_ST, cache = (
            noise.step_B.clamp(max=self.num_codes - 1),
            state["code"].clone(),
            state["cache"].clone(),
        )
        # The first step decodes, too: by it the engine judges whether all slots of a tile are computed alike. Asked
        # before the prior is begun, whose end a device would have to reach first to answer.
        decodes = bool(((place_S == 0) | (place_S == self.num_codes - 1)).any())
        slot_S = torch.arange(len(place_S), device=place_S.device)
        before_S = code_ST[slot_S, (place_S - 1).clamp(min=0)]
        token_S = torch.where(place_S == 0, net.first_token(state["label"]), before_S)
        logits_SK = net.prior.step(token_S, place_S, cache)
        code_ST[slot_S, place_S] = drawn(logits_SK, state["temperature"], noise)
        state = state | {"code": code_ST, "cache": cache}
        if decodes:
            state["x"] = net.autoencoder.decode(net.autoencoder.quantizer.vectors(code_ST))
        return state


def drawn(logits_SK: Tensor, temperature_S: Tensor, noise: Noise) -> Tensor:
    """One of K for each slot, as likely as softmax(logits / temperature) says, by the Gumbel-max trick; the likeliest
    at temperature 0. In float64, so that the noise is the same on all devices to far below what decides."""
    uniform_SK = (noise.bits(logits_SK.shape[1]).double() + 0.5) * 2.0**-32
    gumbel_SK = -(-uniform_SK.log()).log()
    return (logits_SK.double() + temperature_S.double()[:, None] * gumbel_SK).argmax(1)


class ThroughCodes(Decoding):
    """Encodes images to codes and decodes those."""

    def num_steps(self, request: object) -> int:
        return 1

    def start(self, draws: Sequence[Draw[Encode | Reconstruct]], noise: Noise) -> SlotState:
        images = [draw.inputs["image"] for draw in draws if draw.inputs is not None]
        image_SCHW = torch.stack(images).to(noise.device)
        return {"image": image_SCHW, "x": from_bytes(image_SCHW)}

    def step(self, net: Vq, state: SlotState, noise: Noise) -> SlotState:
        """Both halves of the autoencoder at once."""
        code_ST = net.autoencoder.encode(from_bytes(state["image"]))
        return state | {"x": net.autoencoder.decode(net.autoencoder.quantizer.vectors(code_ST))}


class Codes(ThroughCodes):
    """Encodes images to codes, which are the sample."""

    def start(self, draws: Sequence[Draw[Encode | Reconstruct]], noise: Noise) -> SlotState:
        h, w = code_map(self.spec, self.data)
        code_Shw = torch.zeros(len(draws), h, w, dtype=torch.int64, device=noise.device)
        return super().start(draws, noise) | {"code": code_Shw}

    def step(self, net: Vq, state: SlotState, noise: Noise) -> SlotState:
        code_ST = net.autoencoder.encode(from_bytes(state["image"]))
        return state | {"code": code_ST.view_as(state["code"])}

    def finish(self, net: Vq, state: SlotState) -> Tensor:
        """int32 ``(S, h, w)``."""
        return state["code"].to(torch.int32)


FAMILY: Final = Family(
    spec=VqSpec,
    build=Vq,
    losses={"autoencoder": autoencoder_loss, "prior": prior_loss},
    tasks={"generate": FromPrior, "reconstruct": ThroughCodes, "encode": Codes},
    scores={
        "codebook": Score(values=codes, kind="codes", num_codes=num_codes),
        "code_bits_per_dim": Score(values=code_bits_per_dim),
    },
)
"""Codes by quantisation, and a prior over them."""
