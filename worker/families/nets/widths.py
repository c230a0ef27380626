"""How wide a convolutional network is at each resolution that it works at."""

from typing import Final

WIDEST: Final = 4
"""Most channels, in units of those at the finest resolution."""


def widths(base_channels: int, num_resolutions: int) -> list[int]:
    """Channels from the finest resolution to the coarsest: doubled at each halving, up to fourfold."""
    return [base_channels * min(2**halvings, WIDEST) for halvings in range(num_resolutions)]
