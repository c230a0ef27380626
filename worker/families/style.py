"""Style transfer: networks, losses, samplers.

AdaIN (Huang and Belongie, 2017, arXiv 1703.06868): a decoder draws an image from its features once these have the
style's mean and deviation. Gatys et al. (2016, CVPR, "Image Style Transfer Using Convolutional Neural Networks"): an
image descends until its features correlate as the style's do. Both see with the same frozen encoder. c is the content,
s the style, t the goal.

Shape suffixes: B = batch, S = slots, C = channels, H, W = height and width, h, w = of a map, F, G = features.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from shared.specs.style import StyleSpec
from shared.specs.tasks import MatchStyle, Reconstruct, Stylise
from worker.families.family import Batch, DataInfo, Draw, Family, Measured, SlotState
from worker.families.nets.encoder import LAYOUTS, Decoder, Encoder
from worker.kernels.noise import Noise

EPSILON: Final = 1e-5
"""Added to variances, as in instance normalisation."""
STEPS: Final = 100
"""Of a descent where the request does not say."""
BETAS: Final = (0.9, 0.999)
"""Decay of Adam's averages of the gradient and of its square in a descent."""

# Networks ----------------------------------------------------------------------------------------


class Style(nn.Module):
    """The encoder, which stands still, and the decoder, which learns to invert it."""

    def __init__(self, spec: StyleSpec, data: DataInfo) -> None:
        super().__init__()
        self.encoder = Encoder(LAYOUTS[spec.encoder], data.shape).requires_grad_(requires_grad=False)
        self.decoder = Decoder(self.encoder, data.shape[0], base_channels=spec.base_channels)

    def seen(self, x_BCHW: Tensor) -> list[Tensor]:
        """The encoder's maps in float32, or in float64 where the image is."""
        return [map_BFhw.to(x_BCHW.dtype) for map_BFhw in self.encoder(x_BCHW)]


def build(spec: StyleSpec, data: DataInfo) -> Style:
    """Networks for images of ``data.shape``."""
    return Style(spec, data)


# Losses ------------------------------------------------------------------------------------------


def from_bytes(image_BCHW: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return image_BCHW.float() / 255


def as_bytes(x_BCHW: Tensor) -> Tensor:
    """The inverse."""
    return (x_BCHW.clamp(0, 1) * 255).round().to(torch.uint8)


def statistics(map_BFhw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature over all places, ``(B, F, 1, 1)`` each (equations 5 and 6 of AdaIN)."""
    mean_BF11 = map_BFhw.mean((2, 3), keepdim=True)
    variance_BF11 = (map_BFhw - mean_BF11).square().mean((2, 3), keepdim=True)
    return mean_BF11, (variance_BF11 + EPSILON).sqrt()


def adain(content_BFhw: Tensor, style_BFhw: Tensor) -> Tensor:
    """The content's features with the style's mean and deviation (equation 8)."""
    (mean_BF11, deviation_BF11), (mean_s_BF11, deviation_s_BF11) = statistics(content_BFhw), statistics(style_BFhw)
    return deviation_s_BF11 * ((content_BFhw - mean_BF11) / deviation_BF11) + mean_s_BF11


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean square difference."""
    return (a - b).square().mean()


def loss(spec: StyleSpec, net: Style, batch: Batch, _noise: Noise) -> Measured:
    """How far what is drawn is seen from the goal, and its statistics from the style's (equations 11 to 13)."""
    content, style = net.seen(from_bytes(batch["image"])), net.seen(from_bytes(batch["style_dataset"]))
    t_BFhw = adain(content[-1], style[-1])
    made = net.seen(net.decoder(t_BFhw).float())
    pairs = [(statistics(one), statistics(other)) for one, other in zip(made, style, strict=True)]
    distances = [squared(mean, mean_s) + squared(deviation, deviation_s)
                 for (mean, deviation), (mean_s, deviation_s) in pairs]  # fmt: skip
    values = {"content": squared(made[-1], t_BFhw), "style": torch.stack(distances).sum()}
    return Measured(loss=values["content"] + spec.style_weight * values["style"], values=values)


def gram(map_BFhw: Tensor) -> Tensor:
    """How much each two features go together, the mean of their products over all places ``(B, F, G)`` (equation 3 of
    Gatys et al., divided by their M)."""
    x_BFN = map_BFhw.flatten(2)
    return x_BFN @ x_BFN.mT / x_BFN.shape[2]


def distance_in_style(maps: Sequence[Tensor], style_maps: Sequence[Tensor]) -> Tensor:
    """Equations 4 and 5 of Gatys et al. with equal weights of all layers, ``(B,)``."""
    pairs = zip(maps, style_maps, strict=True)
    return torch.stack([(gram(one) - gram(other)).square().mean((1, 2)) / 4 for one, other in pairs]).mean(0)


def distance_in_content(map_BFhw: Tensor, content_BFhw: Tensor) -> Tensor:
    """Equation 1 of Gatys et al., but of the mean over features and places, so that its weight means the same for
    images of all sizes: ``(B,)``."""
    return (map_BFhw - content_BFhw).square().mean((1, 2, 3)) / 2


# Samplers ----------------------------------------------------------------------------------------


def images_of(draws: Sequence[Draw[Reconstruct | Stylise | MatchStyle]], name: str, noise: Noise) -> Tensor:
    """Inputs of the draws in [0, 1]."""
    return from_bytes(torch.stack([draw.inputs[name] for draw in draws if draw.inputs is not None]).to(noise.device))


class Drawing:
    """What the three samplers share: one step, unless it is said otherwise, makes images ``x``."""

    def __init__(self, spec: StyleSpec, data: DataInfo) -> None:
        self.spec = spec

    def num_steps(self, request: Any) -> int:
        return 1

    def finish(self, net: Style, state: SlotState) -> Tensor:
        return as_bytes(state["x"])


class Reconstructing(Drawing):
    """Encodes images and decodes them again."""

    def start(self, draws: Sequence[Draw[Reconstruct]], noise: Noise) -> SlotState:
        return {"x": images_of(draws, "image", noise)}

    def step(self, net: Style, state: SlotState, noise: Noise) -> SlotState:
        return state | {"x": net.decoder(net.seen(state["x"])[-1]).float()}


class Stylising(Drawing):
    """Gives images the style by AdaIN (equation 14)."""

    def start(self, draws: Sequence[Draw[Stylise]], noise: Noise) -> SlotState:
        alpha_S = torch.tensor([draw.request.strength for draw in draws], device=noise.device)
        x_SCHW, style_SCHW = (images_of(draws, name, noise) for name in ("image", "style"))
        return {"x": x_SCHW, "style": style_SCHW, "alpha": alpha_S}

    def step(self, net: Style, state: SlotState, noise: Noise) -> SlotState:
        content_SFhw, style_SFhw = (net.seen(state[name])[-1] for name in ("x", "style"))
        alpha_S111 = state["alpha"][:, None, None, None]
        goal_SFhw = (1 - alpha_S111) * content_SFhw + alpha_S111 * adain(content_SFhw, style_SFhw)
        return state | {"x": net.decoder(goal_SFhw).float()}


class Matching(Drawing):
    """Each step is one of Adam (Kingma and Ba, 2014) for each image ``x``, which begins as the content and stays in
    [0, 1]."""

    def num_steps(self, request: MatchStyle) -> int:
        return request.steps or STEPS

    def start(self, draws: Sequence[Draw[MatchStyle]], noise: Noise) -> SlotState:
        c_SCHW = images_of(draws, "image", noise)
        state = {"content": c_SCHW, "style": images_of(draws, "style", noise), "x": c_SCHW.clone()}
        state |= {"first": torch.zeros_like(c_SCHW), "second": torch.zeros_like(c_SCHW)}
        for name in ("style_weight", "learning_rate"):
            state[name] = torch.tensor([getattr(draw.request, name) for draw in draws], device=noise.device)
        return state

    def step(self, net: Style, state: SlotState, noise: Noise) -> SlotState:
        """A gradient of each slot's own distance, and a step against it."""
        gradient_SCHW = self.gradient(net, state)
        first_SCHW = BETAS[0] * state["first"] + (1 - BETAS[0]) * gradient_SCHW
        second_SCHW = BETAS[1] * state["second"] + (1 - BETAS[1]) * gradient_SCHW.square()
        # In float64, where a power of a whole number of steps rounds alike on all devices.
        unbias1_S111, unbias2_S111 = (
            (1 - torch.full((), beta, dtype=torch.float64, device=noise.device) ** (noise.step_B + 1))
            .float()[:, None, None, None]
            for beta in BETAS
        )  # fmt: skip
        way_SCHW = (first_SCHW / unbias1_S111) / ((second_SCHW / unbias2_S111).sqrt() + 1e-8)
        x_SCHW = (state["x"] - state["learning_rate"][:, None, None, None] * way_SCHW).clamp(0, 1)
        return state | {"x": x_SCHW, "first": first_SCHW, "second": second_SCHW}

    @torch.enable_grad()
    def gradient(self, net: Style, state: SlotState) -> Tensor:
        """Of each slot's distance to its content and, by its weight, to its style (equation 7 of Gatys et al.)."""
        x_SCHW = state["x"].detach().requires_grad_()
        distance_S = distance(net, x_SCHW, state["content"], state["style"], state["style_weight"])
        (gradient_SCHW,) = torch.autograd.grad(distance_S.sum(), x_SCHW)
        return gradient_SCHW


def distance(net: Style, x_SCHW: Tensor, c_SCHW: Tensor, s_SCHW: Tensor, weight_S: Tensor) -> Tensor:
    """What each image descends on, ``(S,)``."""
    maps, content, style = net.seen(x_SCHW), net.seen(c_SCHW), net.seen(s_SCHW)
    return distance_in_content(maps[-1], content[-1]) + weight_S * distance_in_style(maps, style)


FAMILY: Final = Family(
    spec=StyleSpec,
    build=build,
    losses={"decoder": loss},
    tasks={"stylise": Stylising, "match_style": Matching, "reconstruct": Reconstructing},
)
