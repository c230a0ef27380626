"""Every family trains and draws on a device that is not the CPU, though none be here (``stand_in.py``)."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MAY_WAIT: Final[Mapping[str, str]] = {
    "engine/training.py: numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()": (
        "what a step has come to is read at its end, all at once"
    ),
    "families/nets/quantizers.py: if not self.has_begun:": "the codebook is made of the first batch",
    "families/nets/latents.py: if self.training and not self.has_begun:": "the scale is that of the first batch",
    'families/nets/solving.py: adds_noise = bool(at["x_from_n"].any())': "noise is drawn for steps that add some",
    "families/nets/solving.py: guided_G = is_guided_S.nonzero().flatten()  # before the network is begun, as above": (
        "only guidance needs estimates without a class"
    ),
    "families/nets/solving.py: free_F = state[IN_USE].logical_not().nonzero().flatten()": (
        "guidance evaluates the network once where there is room, and twice otherwise"
    ),
    "families/nets/solving.py: if is_new_S.any():": "only the first step encodes",
    "families/vq.py: decodes = bool(((place_S == 0) | (place_S == self.num_codes - 1)).any())": (
        "only the last step decodes"
    ),
    'families/diffusion.py: for factor in state["factor"].unique().tolist():': "each factor is another mean",
}
"""Lines of a step that ask the device something, and what for: all others leave it to work on."""


@pytest.fixture(scope="module")
def everything() -> Mapping[str, Mapping[str, Any]]:
    command = [sys.executable, "-m", "tests.families.on_stand_in"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def noticed(everything: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    return {name: found for name, found in everything.items() if name != "planted"}


def test_the_mistakes_that_these_tests_are_for_are_seen(everything: Mapping[str, Mapping[str, Any]]) -> None:
    assert everything["planted"] == {
        "lies elsewhere": "error",
        "asks": "waits",
        "sends a list": "waits",
        "is fetched": "waits",
        "cannot be repeated": "refused",
        "goes on": "nothing",
        "autocast": ["torch.bfloat16", "torch.float32", "torch.bfloat16"],
    }


def test_nothing_meets_what_lies_elsewhere(noticed: Mapping[str, Mapping[str, Any]]) -> None:
    assert {name: found["errors"] for name, found in noticed.items() if found["errors"]} == {}
    assert len(noticed) > 50


def test_no_step_asks_for_what_cuda_does_another_way_each_time(noticed: Mapping[str, Mapping[str, Any]]) -> None:
    assert {name: found["refused"] for name, found in noticed.items() if found["refused"]} == {}


def test_steps_wait_for_the_device_only_where_numbers_decide_what_is_done(
    noticed: Mapping[str, Mapping[str, Any]],
) -> None:
    waits = {place for found in noticed.values() for place in found["waits"]}

    assert waits - MAY_WAIT.keys() == set()
    assert MAY_WAIT.keys() - waits == set()


def test_steps_that_a_gpu_repeats_ask_it_nothing_but_whether_something_has_begun(
    noticed: Mapping[str, Mapping[str, Any]],
) -> None:
    """Those that do are not captured; tests/families/test_captured_steps.py has them, too."""
    asking = {name: found["waits"] for name, found in noticed.items() if name.endswith(", captured") and found["waits"]}

    assert all("has_begun" in place for places in asking.values() for place in places)
    assert {name.split("-")[1] for name in asking} == {"quantizer=ema", "autoencoder=vae@1", "autoencoder=vq@1"}
