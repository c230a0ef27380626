"""Noisemill: what a user imports. Light: no web framework, no database, no torch.

from noisemill import Client
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noisemill.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    # On demand, so that importing ``noisemill.local`` does not pull in an HTTP client.
    if name == "Client":
        from noisemill.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
