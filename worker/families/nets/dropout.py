"""Dropout (Srivastava et al., 2014) whose masks are keyed, so that a resumed training draws the same ones."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from worker.kernels.noise import Noise

FIRST_STREAM = 1000
"""Masks are drawn from this stream on, one for each use; losses draw from lower ones."""


class Dropout(nn.Module):
    """The dropout of a whole network: off, except inside of ``drawing``."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.is_never_compiled = probability > 0
        """Its masks are counted, which a compiler would take for constants."""
        self._noise: Noise | None = None
        self._num_drawn = 0

    @contextmanager
    def drawing(self, noise: Noise | None) -> Iterator[None]:
        """Draw the masks of one forward pass from ``noise``, in the order of their use; none without noise."""
        self._noise, self._num_drawn = noise, 0
        try:
            yield
        finally:
            self._noise = None

    def again(self) -> AbstractContextManager[None]:
        """Draw once more, later, the masks that come next now."""
        noise, first = self._noise, self._num_drawn

        @contextmanager
        def drawing_again() -> Iterator[None]:
            before = self._noise, self._num_drawn
            self._noise, self._num_drawn = noise, first
            try:
                yield
            finally:
                self._noise, self._num_drawn = before

        return drawing_again()

    def forward(self, x_BX: Tensor) -> Tensor:
        """Zero each element with the probability, and scale up the others; batch axis first."""
        if self.probability == 0 or self._noise is None:
            return x_BX
        uniform_BX = self._noise.uniform(*x_BX.shape[1:], stream=FIRST_STREAM + self._num_drawn)
        self._num_drawn += 1
        return x_BX * (uniform_BX >= self.probability).to(x_BX.dtype) / (1 - self.probability)
