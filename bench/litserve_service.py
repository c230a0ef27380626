"""The peer of ``bench/serving.py`` behind HTTP: LitServe with diffusers' loop in it, as either's first page has it.

Requests of different numbers of steps cannot share a batch of diffusers' schedulers, so there is none.

    pip install litserve
    python -m bench.litserve_service PORT THREADS
"""

import sys
from importlib import import_module
from typing import Any, Final

import torch

from bench.serving import Arrival, as_diffusers_does

litserve: Final[Any] = import_module("litserve")


class Drawing(litserve.LitAPI):
    """``{"steps", "seed"}`` to one sample, as nested lists."""

    def setup(self, device: str) -> None:
        torch.set_num_threads(int(sys.argv[2]))
        self.draw: Any = as_diffusers_does()

    def decode_request(self, request: dict[str, Any], **_: Any) -> Arrival:
        return Arrival(after=0, steps=request["steps"], seed=request["seed"])

    def predict(self, x: Arrival, **_: Any) -> torch.Tensor:
        sample: torch.Tensor = self.draw(x)
        return sample

    def encode_response(self, output: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"sample": output.tolist()}


def main() -> None:
    server = litserve.LitServer(Drawing(), accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(port=int(sys.argv[1]), generate_client_file=False)


if __name__ == "__main__":
    main()
