"""Averages of weights whose length is chosen after training (Karras et al., 2024, "EDM2", arXiv 2312.02696, section 3).

The weights after step t of T count in proportion to t^gamma, so that an average's length is a share of the training:
its profile's standard deviation over T, ``sigma_rel``. While it trains, averages of two lengths are kept, and copies of
both at equal intervals; a combination of these copies comes as close as may be to the average of any length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.errors import ModelLoadFailed
from worker.engine.checkpoint import detached_copy, read_tensors, write_tensors

LENGTHS: Final = (0.10, 0.05)
"""Of the averages that are kept; the first is the one that is measured, shown and registered."""


def exponent(length: float) -> float:
    """Return gamma of the average of a relative length: the positive root of ``sigma^2 (g + 2)^2 (g + 3) = g + 1``.

    The inverse of ``sigma_rel = ((g + 1) / ((g + 2)^2 (g + 3)))^(1/2)``, for lengths up to 12^(-1/2), which is gamma 0.
    """
    squared = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - squared, 12.0 - squared]).real.max())


def power_decay(step: int, length: float) -> float:
    """Decay of the average when the weights after ``step`` (counted from 0) join it: ``(1 - 1/t)^(gamma + 1)``.

    The first is zero: initial weights never count.
    """
    return (step / (step + 1)) ** (exponent(length) + 1)


def products(ends: Sequence[float], lengths: Sequence[float], end: float, length: float) -> NDArray[np.float64]:
    """Inner products of profiles with that of ``length`` at ``end``; each is ``(g + 1) t^g / T^(g + 1)`` on [0, T]."""
    ends_N, gammas_N = np.asarray(ends, np.float64), np.array([exponent(one) for one in lengths])
    gamma = exponent(length)
    longer_N, shorter_N = np.maximum(ends_N, end), np.minimum(ends_N, end)
    # Of the one that goes on beyond the other's end, only the exponent says how little it had counted until there.
    of_longer_N = np.where(ends_N > end, gammas_N, gamma)
    overlap_N = (shorter_N / longer_N) ** of_longer_N / longer_N
    return (gammas_N + 1) * (gamma + 1) / (gammas_N + gamma + 1) * overlap_N


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How copies are combined."""

    coefficients: Sequence[float]
    """One for each copy; their sum is 1, so that a weight which stood still is kept."""
    error: float
    """Distance of the combined profile from the wanted one, in units of that one's norm."""


def fit(ends: Sequence[float], lengths: Sequence[float], *, length: float) -> Fit:
    """The combination of copies, of these lengths and made at these steps, that is nearest to ``length`` at the last.

    Least squares on the profiles (section 3.2), under the condition that the coefficients add up to 1.
    """
    last, num = max(ends), len(ends)
    gram_NN = np.stack([products(ends, lengths, *one) for one in zip(ends, lengths, strict=True)])
    wanted_N = products(ends, lengths, last, length)
    # The multiplier of the condition is the last unknown. In units of the last step, so that all are of one size.
    system = np.block([[gram_NN * last, np.ones((num, 1))], [np.ones((1, num)), np.zeros((1, 1))]])
    coefficients_N = np.linalg.lstsq(system, np.append(wanted_N * last, 1.0))[0][:num]
    norm = products([last], [length], last, length)[0]
    squared = norm - 2 * wanted_N @ coefficients_N + coefficients_N @ gram_NN @ coefficients_N
    return Fit(coefficients=coefficients_N.tolist(), error=float(np.sqrt(max(squared, 0.0) / norm)))


class PowerAverages:
    """The second average of a network's trained weights, and the copies that were made of both.

    Copies are float32. In fp16 there is room for twice as many, but rounding it is worse than what eight leave out: the
    coefficients of a length in between add up to 2.5 in size (measured: errors of 2e-4 of the weights, not 1e-4).
    """

    def __init__(self, net: nn.Module, average: nn.Module, *, steps: int, num_snapshots: int) -> None:
        trained = [name for name, weight in net.named_parameters(remove_duplicate=False) if weight.requires_grad]
        self._weights = {name: net.get_parameter(name) for name in trained}
        first: dict[str, Tensor] = {name: average.get_parameter(name) for name in trained}
        second = {name: weight.detach().clone() for name, weight in first.items()}
        self._kept: tuple[dict[str, Tensor], ...] = (first, second)
        self.due = sorted({-(-number * steps // num_snapshots) for number in range(1, num_snapshots + 1)})
        """The steps after which copies are made, the last being the training's last."""
        self.snapshots: dict[str, Tensor] = {}
        """The copies, in main memory, by ``_name``."""

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Let the weights after ``step``, counted from 0, join the second average, and copy both where that is due."""
        weight = 1 - power_decay(step, LENGTHS[1])
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self._kept[1].values()), list(self._weights.values()), weight
        )
        if step + 1 in self.due:
            for number, kept in enumerate(self._kept):
                self.snapshots |= {_name(step + 1, number, name): detached_copy(one) for name, one in kept.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that a resume needs, besides the first average: copies of it and of what never changes again."""
        return {f"second.{name}": detached_copy(weight) for name, weight in self._kept[1].items()} | self.snapshots

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take over what ``tensors()`` gave after ``step`` steps.

        Raises:
            KeyError, RuntimeError: something is missing, or has another shape.
        """
        for name, weight in self._kept[1].items():
            weight.copy_(tensors[f"second.{name}"])
        made = [one for one in self.due if one <= step]
        names = [_name(one, number, name) for one in made for number, kept in enumerate(self._kept) for name in kept]
        self.snapshots = {name: tensors[name] for name in names}

    def write(self, path: Path, average: nn.Module, header: Mapping[str, Any]) -> None:
        """Write what ``averaged`` reads: the copies, and whatever else ``average`` holds."""
        rest = {
            f"rest.{name}": detached_copy(one)
            for name, one in average.state_dict().items()
            if name not in self._weights
        }
        write_tensors(path, rest | self.snapshots, {**header, "lengths": list(LENGTHS)})


def _name(step: int, number: int, name: str) -> str:
    """Of the copy, made after ``step``, of one weight of the average ``number``."""
    return f"{step}.{number}.{name}"


def averaged(path: Path, *, length: float) -> tuple[dict[str, Tensor], Fit]:
    """A network's state, its weights averaged over ``length``, from the copies that a training made.

    Raises:
        ModelLoadFailed: the file is damaged, or something else.
    """
    tensors, header = read_tensors(path)
    copies: dict[tuple[int, int], dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    try:
        for key, tensor in tensors.items():
            first, rest = key.split(".", 1)
            if first == "rest":
                state[rest] = tensor
            else:
                number, name = rest.split(".", 1)
                copies.setdefault((int(first), int(number)), {})[name] = tensor
        ends, lengths = zip(*((step, header["lengths"][number]) for step, number in copies), strict=True)
    except (KeyError, ValueError, IndexError) as error:
        raise ModelLoadFailed(f"{path.name} holds no averages of a training: {error!r}") from error
    found = fit(ends, lengths, length=length)
    for name, tensor in next(iter(copies.values())).items():
        parts = zip(found.coefficients, (copy[name].double() for copy in copies.values()), strict=True)
        state[name] = torch.stack([share * part for share, part in parts]).sum(0).to(tensor.dtype)
    return state, found
