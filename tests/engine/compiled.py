"""Compiles a small network's blocks into a folder, does two steps, and prints what was found there and what was not.

python -m tests.engine.compiled FOLDER
"""

import json
import sys
from pathlib import Path

from torch._dynamo.utils import counters

from tests.engine.test_blocks import batch_at, calls_of, compile_now, trainer_of
from worker.engine.numerics import exact

if __name__ == "__main__":
    with exact(1):
        trainer = trainer_of("vae")
        compile_now(trainer, calls_of(trainer), Path(sys.argv[1]))
        losses = [trainer.advance(batch_at(step))["loss"] for step in (1, 2)]
    caches = (counters["inductor"], "fxgraph_cache"), (counters["aot_autograd"], "autograd_cache")
    hits, misses = (sum(counted[f"{name}_{what}"] for counted, name in caches) for what in ("hit", "miss"))
    print(json.dumps({"hits": hits, "misses": misses, "losses": losses}))
