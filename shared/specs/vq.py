"""What may be asked of an autoencoder with discrete codes and an autoregressive prior over them (VQ-VAE: van den Oord
et al., 2017, arXiv 1711.00937; FSQ: Mentzer et al., 2023, arXiv 2309.15505)."""

from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, Field

from shared.specs.spec import FROM_LIST, Direction, Modality
from shared.specs.training import TrainSpec, Uses

MOST_CODES: Final = 2**18
"""Each code is a row of the prior's first and of its last matrix."""


def _few_codes(levels: tuple[int, ...]) -> tuple[int, ...]:
    if (num_codes := prod(levels)) > MOST_CODES:
        raise ValueError(f"the product of the levels is the number of codes, at most {MOST_CODES} and not {num_codes}")
    return levels


Levels = Annotated[
    tuple[Annotated[int, Field(ge=2, le=64)], ...],
    FROM_LIST,
    Field(min_length=1, max_length=8),
    AfterValidator(_few_codes),
]


class VqSpec(TrainSpec):
    """Train an autoencoder whose latent is a map of codes, and a causal transformer that draws such maps."""

    modality: ClassVar[Modality] = "image"
    tasks: ClassVar[Mapping[str, frozenset[str]]] = {
        "generate": frozenset({"labels", "temperature"}),
        "reconstruct": frozenset(),
        "encode": frozenset(),
    }
    used_with: ClassVar[Uses] = {
        **TrainSpec.used_with,
        "levels": {"quantizer": {"fsq"}},
        "codebook_size": {"quantizer": {"ema"}},
        "code_dim": {"quantizer": {"ema"}},
        "codebook_decay": {"quantizer": {"ema"}},
        "commitment": {"quantizer": {"ema"}},
        "dead_below": {"quantizer": {"ema"}},
    }
    architecture: ClassVar[frozenset[str]] = frozenset({
        "preset", "quantizer", "halvings", "levels", "codebook_size", "code_dim", "class_conditional",
    })  # fmt: skip

    family: Literal["vq"]
    preset: Literal["xs", "s", "b"] = "xs"
    """Channels of the autoencoder, width and depth of the transformer: about 1.4, 8 and 44 million weights."""
    quantizer: Literal["fsq", "ema"] = "fsq"
    """Finite scalar quantisation, or a codebook that follows the encoder by a moving average (VQ-VAE)."""
    halvings: int = Field(default=2, ge=1, le=5)
    """How often the resolution is halved from the image to its map of codes."""
    levels: Levels = (8, 5, 5, 5)
    """Values that each dimension of a latent may take; their product is the number of codes, at most 2^18 (``fsq``
    only)."""
    codebook_size: int = Field(default=512, ge=2, le=65_536)
    """Number of codes (``ema`` only)."""
    code_dim: int = Field(default=16, ge=1, le=1024)
    """Dimensions of a code's vector (``ema`` only)."""
    codebook_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the moving averages that make the codebook (``ema`` only)."""
    commitment: float = Field(default=0.25, ge=0, le=100)
    """Weight of the encoder's distance from its codes, the paper's beta (``ema`` only)."""
    dead_below: float = Field(default=0.1, ge=0, lt=1)
    """A code used less than this, in units of the average code's usage, begins again elsewhere (``ema`` only)."""
    prior_start: float = Field(default=0.3, ge=0, lt=1)
    """Share of the steps in which the autoencoder learns alone: the codes of its beginning are not worth learning."""
    class_conditional: bool = True
    """Tell the prior the classes of the data, if it has some."""

    @property
    def repeats_blocks(self) -> bool:
        return True

    @property
    def couples_samples(self) -> bool:
        """A learned codebook follows all latents of a batch."""
        return self.quantizer == "ema"

    def compared_by(self) -> Mapping[str, Direction]:
        """Figures of the autoencoder; those of the prior are of codes that change their meaning."""
        return {"autoencoder_loss": "lower", "reconstruction": "lower", "perplexity": "higher", "usage": "higher"}

    def scores_on(self, data: Mapping[str, Any], info: Mapping[str, Any]) -> frozenset[str]:
        """Use of the codebook; and what codes cost under the prior, on data whose classes it knows."""
        known, told = self.num_classes(info), data.get("num_classes", 0)
        return frozenset({"codebook"} | ({"code_bits_per_dim"} if not known or 0 < told <= known else set()))

    def trains(self, part: str, step: int) -> bool:
        """The autoencoder always, the prior from ``prior_start`` on."""
        return part == "autoencoder" or step >= int(self.prior_start * self.steps)
