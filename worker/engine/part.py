"""One separately trained part of a network: parameters, optimizer, loss scale. Knows no loss.

What is learned is float32. The network may compute with a rounded copy of it, whose gradients are added up here in
float32, and which is rounded anew after each step: what is smaller than a step of bfloat16 is not lost.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.specs.training import TrainSpec

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW remembers of each parameter."""


class Part:
    """The optimizer of some named parameters. Its state is a flat mapping of tensors."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        spec: TrainSpec,
        *,
        scale_loss: bool,
        computing: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        """``computing``: what the network computes with, by the same names; ``parameters`` themselves when left out."""
        self.parameters = dict(parameters)
        self.computing = dict(computing or parameters)
        self._copies = [
            (learned, self.computing[name])
            for name, learned in self.parameters.items()
            if self.computing[name] is not learned
        ]
        self.grad_clip = spec.grad_clip
        tensors = list(self.parameters.values())
        self.optimizer = torch.optim.AdamW(
            [
                # Shrinking biases and norm gains towards zero has no justification.
                {"params": [tensor for tensor in tensors if tensor.ndim > 1], "weight_decay": spec.weight_decay},
                {"params": [tensor for tensor in tensors if tensor.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=spec.learning_rate,
            fused=all(tensor.device.type in ("cpu", "cuda") for tensor in tensors),
        )
        # In its place on the device, so that a recorded step can be repeated with another one. CUDA takes float32.
        place: dict[str, Any] = {"dtype": torch.float64 if tensors[0].is_cpu else torch.float32}
        self.learning_rate = torch.full((), spec.learning_rate, device=tensors[0].device, **place)
        """Of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        # At once: a network whose moments do not fit shall not train to the end of its first step.
        for tensor in tensors:
            self.optimizer.state[tensor] = _moments(tensor)
        self.scaler = torch.amp.GradScaler(tensors[0].device.type, enabled=scale_loss)

    def forget(self) -> None:
        """Drop the gradient that was accumulated."""
        self.optimizer.zero_grad()
        for _, copy in self._copies:
            copy.grad = None

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``."""
        self.scaler.scale(loss).backward(inputs=list(self.computing.values()))
        for learned, copy in self._copies:
            if copy.grad is not None:
                grad = copy.grad.to(learned.dtype)
                learned.grad = grad if learned.grad is None else learned.grad.add_(grad)
                copy.grad = None

    @torch.no_grad()
    def round(self) -> None:
        """Let the network compute with what is learned by now."""
        for learned, copy in self._copies:
            copy.copy_(learned)

    @property
    def gradients(self) -> list[Tensor]:
        """Those that were accumulated; which parameters have one depends on the loss alone."""
        return [tensor.grad for tensor in self.parameters.values() if tensor.grad is not None]

    def descend(self, betas: tuple[float, float], *, is_recorded: bool = False) -> Tensor:
        """One optimizer step of ``learning_rate`` down the accumulated gradient; returns its norm before clipping.
        ``is_recorded``: it is computed later.

        With loss scaling, a step whose gradient overflowed is left out and the scale lowered.
        """
        tensors = list(self.parameters.values())
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(tensors, self.grad_clip)
        for group in self.optimizer.param_groups:
            group["betas"], group["capturable"] = betas, is_recorded
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.round()
        return grad_norm

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that the next step depends on, besides the parameters."""
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            yield from ((f"{name}.{moment}", state[moment]) for moment in MOMENTS)
        for name, value in self.scaler.state_dict().items():
            if name in ("scale", "_growth_tracker"):
                yield f"scaler.{name}", torch.tensor(value, dtype=torch.float64)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors()`` gave.

        Raises:
            KeyError: something is missing.
        """
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                self.optimizer.state[parameter][moment].copy_(tensors[f"{name}.{moment}"])
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            state["scale"] = tensors["scaler.scale"].item()
            state["_growth_tracker"] = int(tensors["scaler._growth_tracker"].item())
            self.scaler.load_state_dict(state)


def _moments(parameter: nn.Parameter) -> dict[str, Tensor]:
    # The fused kernel walks raw memory, so a moment must be laid out as its parameter is.
    exp_avg, exp_avg_sq = (torch.zeros_like(parameter, requires_grad=False) for _ in range(2))
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}
