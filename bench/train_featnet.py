"""Train the classifier of digits whose features are shipped (``worker/metrics/digits.safetensors``).

Plain cross-entropy on the first 8,000 digits, each batch moved by up to two pixels. Prints the accuracy on the
last 2,000 and the SHA-256 to pin in ``worker/metrics/features.py``.

    python -m bench.train_featnet --data FOLDER --out worker/metrics/digits.safetensors
"""

import argparse
import hashlib
import time
from pathlib import Path
from typing import Final

import torch
from torch import nn

from bench.digits import Digits, read_digits
from worker.engine.checkpoint import write_weights
from worker.engine.schedule import learning_rate
from worker.metrics.features import FeatureNetwork, FeatureNetworkSpec

SPEC: Final = FeatureNetworkSpec(
    in_channels=1, resolution=28, channels=[16, 32, 16], halve_after=[0, 1, 2], num_features=64, num_classes=10
)
EPOCHS: Final = 12
BATCH_SIZE: Final = 64
PEAK: Final = 3e-3
FURTHEST: Final = 2
"""Pixels that a batch is moved by at most, along each axis."""


def train(digits: Digits, generator: torch.Generator) -> FeatureNetwork:
    """The network after ``EPOCHS`` passes of AdamW with a cosine schedule."""
    net = FeatureNetwork(SPEC)
    optimizer = torch.optim.AdamW(net.parameters(), PEAK, weight_decay=0.01)
    steps = EPOCHS * len(digits.train) // BATCH_SIZE
    order = torch.cat([torch.randperm(len(digits.train), generator=generator) for _ in range(EPOCHS)])
    for step, rows in enumerate(order.split(BATCH_SIZE)[:steps]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=PEAK, steps=steps, warmup_steps=50, schedule="cosine")
        shift = torch.randint(-FURTHEST, FURTHEST + 1, (2,), generator=generator).tolist()
        logits = net(digits.train.images[rows].roll(shift, (2, 3)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, digits.train.labels[rows], label_smoothing=0.05).backward()
        optimizer.step()
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the idx files")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    digits = read_digits(options.data)
    torch.manual_seed(0)
    began = time.perf_counter()
    net = train(digits, torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - began
    with torch.no_grad():
        right = net(digits.held_out.images).argmax(1) == digits.held_out.labels
    write_weights(options.out, net, {"network": SPEC.model_dump(mode="json")})
    print(f"{right.float().mean().item():.4f} of the held-out digits right, after {seconds:.0f} s")
    print(f"SHA-256 {hashlib.sha256(options.out.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
