"""The command line: results on stdout, the rest on stderr, an exit code that says how it went, never a traceback."""

import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from noisemill.cli import app
from noisemill.client import Client
from shared.errors import NanLoss, WorkerLost
from tests.client.conftest import API_KEY
from tests.client.hand import Hand
from tests.client.little import LittleServer
from tests.client.log import JOB, JobServer, event, finished_log, job_view

REPOSITORY = Path(__file__).parents[2]
Run = Callable[..., Result]


@pytest.fixture
def run(api_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command against the real server; its exit code must be the expected one."""
    monkeypatch.setenv("NOISEMILL_URL", api_url)
    monkeypatch.setenv("NOISEMILL_API_KEY", API_KEY)
    return _run


def _run(*arguments: str, exit_code: int = 0, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def train(dataset_id: str) -> list[str]:
    """The arguments of a small training."""
    return ["train", "--dataset", dataset_id, "--model", "digits", "--steps", "20"]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "cats.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", b"a cat")
    return path


def test_a_dataset_is_added_then_found_by_its_name(run: Run, hand: Hand, archive: Path):
    with ThreadPoolExecutor(1) as worker:
        worker.submit(_when_there_is_work, hand.ingest)
        dataset_id = run("datasets", "add", str(archive), "--name", "my cats").stdout.strip()

    assert json.loads(run("datasets", "show", dataset_id, "--json").stdout)["state"] == "ready"
    assert dataset_id in run("datasets", "list").stdout
    job_id = run("train", "--dataset", "my cats", "--model", "cats", "--set", "beta=0.5", "--no-wait").stdout.strip()
    spec = json.loads(run("jobs", "show", job_id, "--json").stdout)["spec"]
    assert (spec["dataset"], spec["beta"]) == (dataset_id, 0.5)
    run("jobs", "cancel", job_id)


def _when_there_is_work(work: Callable[[], object]) -> None:
    while True:
        try:
            work()
        except IndexError:  # nothing to claim yet
            continue
        return


def _train_slowly(hand: Hand) -> None:
    claim = hand.claim("train")
    for step in range(1, 21):
        hand.step(claim, step, 20, loss=2.5, rate=10.0, eta_seconds=(20 - step) / 10)
    hand.train(claim)


def test_training_shows_its_progress_on_stderr_alone(run: Run, hand: Hand, train: list[str]):
    with ThreadPoolExecutor(1) as worker:
        worker.submit(_when_there_is_work, lambda: _train_slowly(hand))
        result = run(*train)

    assert re.search(r"training 10/20, loss 2.5, 10 steps/s, 1 s left", result.stderr)
    assert re.search(r"noisemill generate digits@\d+", result.stderr)
    assert re.fullmatch(r"job_[0-9a-f]{32}\n", result.stdout)


def test_with_json_stdout_is_json_alone(run: Run, hand: Hand, train: list[str], tmp_path: Path):
    with ThreadPoolExecutor(1) as worker:
        worker.submit(_when_there_is_work, lambda: _train_slowly(hand))
        trained = json.loads(run(*train, "--json").stdout)

    ref = trained["result"]["model"]
    assert trained["state"] == "succeeded"
    assert [item["name"] for item in json.loads(run("models", "list", "--json").stdout)] == ["digits"]
    assert json.loads(run("models", "show", ref, "--json").stdout)["ref"] == ref
    assert json.loads(run("jobs", "list", "--type", "train", "--limit", "1", "--json").stdout)[0]["id"] == trained["id"]
    assert json.loads(run("artifacts", "list", trained["id"], "--json").stdout)[0]["name"] == "model.safetensors"
    assert json.loads(run("workers", "--json").stdout) == []


def test_samples_are_generated_into_a_folder(run: Run, hand: Hand, train: list[str], tmp_path: Path):
    job_id = run(*train, "--no-wait").stdout.strip()
    hand.train(hand.claim("train"))
    samples = {"sample-0000.png": b"zero", "sample-0001.png": b"one"}

    with ThreadPoolExecutor(1) as worker:
        worker.submit(_when_there_is_work, lambda: hand.succeed(hand.claim("generate"), samples))
        done = run("generate", "digits", "--num-samples", "2", "--out", str(tmp_path / "new"), "--json")

    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == samples
    assert len(json.loads(done.stdout)["files"]) == 2
    got = run("artifacts", "get", job_id, "--out", str(tmp_path / "weights"))
    assert Path(got.stdout.strip()).read_bytes() == b"weights"


def test_figures_are_shown_with_how_sure_they_are(run: Run, hand: Hand, train: list[str], tmp_path: Path):
    run(*train, "--no-wait")
    claim = hand.claim("train")
    hand.train(claim)
    figures = {
        "mind": {"value": 0.25, "confidence_95": [0.2, 0.3], "num_samples": 1000},
        "psnr": {"value": 21.5, "confidence_95": [None, None], "num_samples": 8},
    }

    with ThreadPoolExecutor(1) as worker:
        measure = functools.partial(hand.succeed, artifacts={"evaluation.json": b"{}"}, figures=figures)
        worker.submit(_when_there_is_work, lambda: measure(hand.claim("generate")))
        done = run(
            "evaluate",
            "digits",
            "--dataset",
            claim.inputs["dataset"]["id"],
            "--metric",
            "mind",
            "--out",
            str(tmp_path / "report"),
        )

    assert "mind                 0.25  (0.2 to 0.3, 1000 samples)" in done.stderr
    assert "psnr                 21.5  (? to ?, 8 samples)" in done.stderr
    assert (tmp_path / "report" / "evaluation.json").read_bytes() == b"{}"


def test_watching_with_json_prints_an_event_a_line(run: Run, hand: Hand, train: list[str]):
    job_id = run(*train, "--no-wait").stdout.strip()
    hand.train(hand.claim("train"))

    lines = run("jobs", "watch", job_id, "--json").stdout.splitlines()

    assert [json.loads(line)["seq"] for line in lines] == [1, 2, 3]


def test_a_failed_job_is_an_exit_code_and_a_reason(run: Run, hand: Hand, train: list[str]):
    job_id = run(*train, "--no-wait").stdout.strip()
    hand.fail(hand.claim("train"), NanLoss("the loss is not a number at step 7"))

    result = run("jobs", "watch", job_id, exit_code=1)

    assert "nan_loss" in result.stderr and "at step 7" in result.stderr
    assert "nan_loss" in run("jobs", "show", job_id).stdout


def test_a_job_can_be_canceled(run: Run, train: list[str]):
    job_id = run(*train, "--no-wait").stdout.strip()

    assert f"{job_id} is canceled" in run("jobs", "cancel", job_id).stderr
    assert f"{job_id} is canceled" in run("jobs", "cancel", job_id).stderr
    assert "canceled" in run("jobs", "list", "--state", "canceled").stdout


def test_a_cancel_returns_when_the_job_has_really_stopped(run: Run, real: Client, hand: Hand, train: list[str]):
    job_id = run(*train, "--no-wait").stdout.strip()
    claim = hand.claim("train")

    def stop_when_asked() -> None:
        while real.job(job_id).state != "canceling":
            pass
        hand.hand_back(claim)

    with ThreadPoolExecutor(1) as worker:
        worker.submit(stop_when_asked)
        result = run("jobs", "cancel", job_id, "--json")

    assert json.loads(result.stdout)["state"] == "canceled"


def test_a_job_is_paused_resumed_retried_and_deleted(run: Run, train: list[str]):
    job_id = run(*train, "--no-wait").stdout.strip()

    assert f"{job_id} is paused" in run("jobs", "pause", job_id).stderr
    assert json.loads(run("jobs", "resume", job_id, "--json").stdout)["state"] == "queued"
    run("jobs", "cancel", job_id)
    again = run("jobs", "retry", job_id).stdout.strip()
    assert again in run("jobs", "show", job_id).stdout and job_id in run("jobs", "show", again).stdout
    run("jobs", "cancel", again)
    assert f"{job_id} is erased" in run("jobs", "delete", job_id).stderr
    assert "was erased" in run("jobs", "show", job_id, exit_code=1).stderr


def _draw(hand: Hand, sha256: str, reproducibility: str = "same_hardware") -> None:
    made = {"sha256": sha256, "reproducibility": reproducibility, "fingerprint": {"torch": f"of {sha256}"}}
    hand.succeed(hand.claim("generate"), **made)


@pytest.mark.parametrize(("again", "exit_code"), [("a", 0), ("b", 1)])
def test_a_job_is_reproduced_and_other_bytes_are_an_exit_code(
    run: Run, hand: Hand, train: list[str], again: str, exit_code: int
):
    run(*train, "--no-wait")
    hand.train(hand.claim("train"))
    job_id = run("generate", "digits", "--no-wait").stdout.strip()
    _draw(hand, "a")

    with ThreadPoolExecutor(1) as worker:
        worker.submit(_when_there_is_work, lambda: _draw(hand, again))
        done = run("reproduce", job_id, exit_code=exit_code)

    told = [f"Identical to {job_id}: a.", f"Not identical to {job_id}: expected a, found b."][exit_code]
    assert told in done.stderr
    assert ("torch: of a then, of b now" in done.stderr) == bool(exit_code)
    assert job_id in run("jobs", "show", done.stdout.strip()).stdout


def test_a_job_that_cannot_be_had_again_is_reproduced_with_a_warning(run: Run, hand: Hand, train: list[str]):
    run(*train, "--no-wait")
    hand.train(hand.claim("train"))
    job_id = run("generate", "digits", "--no-wait").stdout.strip()
    assert "only one that succeeded is reproduced" in run("reproduce", job_id, exit_code=1).stderr
    _draw(hand, "a", reproducibility="none")

    again = run("reproduce", job_id, "--no-wait")

    assert "its bytes cannot be had again" in again.stderr
    run("jobs", "cancel", again.stdout.strip())


def test_a_waiting_job_says_why_and_how_long(little: LittleServer, monkeypatch: pytest.MonkeyPatch):
    queue = {"position": 3, "reason": "behind_others", "eta": {"p50": 65.0, "p90": 130.4}}
    little.app = JobServer(job=job_view("queued", queue=queue, attempts=[], attempt=0))
    monkeypatch.setenv("NOISEMILL_URL", little.url)

    shown = _run("jobs", "show", JOB).stdout

    assert "number 3, behind others; starts in about 1 min 5 s, likely within 2 min 10 s" in shown


def test_a_job_that_waits_for_another_says_for_which(run: Run, train: list[str]):
    first = run(*train, "--no-wait").stdout.strip()

    second = run("generate", first, "--no-wait").stdout.strip()

    shown = run("jobs", "show", second).stdout
    assert f"waiting for jobs {first}" in shown and f"model: {first}" in shown
    run("jobs", "cancel", first)
    assert "dependency_failed" in run("jobs", "show", second).stdout


def test_a_failed_job_shows_what_ended_each_attempt(run: Run, hand: Hand, train: list[str]):
    job_id = run(*train, "--no-wait").stdout.strip()
    hand.fail(hand.claim("train"), WorkerLost("gone"), backoff=timedelta(0))
    hand.fail(hand.claim("train"), NanLoss("no number"))

    assert "1: worker_lost, 2: nan_loss" in run("jobs", "show", job_id).stdout


def test_a_spec_can_come_from_a_file_or_stdin(run: Run, dataset_id: str, tmp_path: Path):
    spec = {"family": "vae", "dataset": dataset_id, "model": "from-file", "steps": 7}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    job = {"type": "train", "spec": spec, "labels": {"from": "stdin"}}

    first = run("train", "--file", str(tmp_path / "spec.json"), "--steps", "8", "--no-wait", "--json")
    second = run("train", "--file", "-", "--label", "for=test", "--no-wait", "--json", stdin=json.dumps(job))

    assert json.loads(first.stdout)["spec"]["steps"] == 8
    assert json.loads(second.stdout)["labels"] == {"from": "stdin", "for": "test"}
    for result in (first, second):
        run("jobs", "cancel", json.loads(result.stdout)["id"])


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["train", "--dataset", "nothing", "--model", "m"], 1, "no dataset named 'nothing'"),
        (["train", "--dataset", "ds_" + "0" * 32, "--model", "m"], 1, "/spec/dataset"),
        (["train", "--model", "m", "--steps", "0"], 1, "/spec/steps"),
        (["train", "--model", "m", "--set", "typo=1"], 1, "/spec/typo"),
        (["generate", "nothing"], 1, "/spec/model"),
        (["jobs", "show", "job_" + "0" * 32], 1, "no such job"),
        (["datasets", "add", "missing.zip"], 1, "does not exist"),
        (["train", "--set", "steps"], 2, "KEY=VALUE"),
        (["train", "--file", "missing.json"], 2, "missing.json"),
        (["generate", "m", "--out", "x", "--no-wait"], 2, "--out"),
        (["jobs", "dance"], 2, "dance"),
    ],
)
def test_a_mistake_is_explained_on_stderr(run: Run, arguments: list[str], exit_code: int, words: str):
    result = run(*arguments, exit_code=exit_code)

    assert words in re.sub(r"[│╭╮╰╯─\s]+", " ", result.stderr)
    assert result.stdout == ""


def test_without_a_server_the_command_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch):
    assert "start one with `noisemill up`" in _run("jobs", "list", exit_code=1).stderr
    monkeypatch.setenv("NOISEMILL_URL", "http://127.0.0.1:9")
    result = _run("jobs", "list", exit_code=1)
    assert result.stderr == (
        "Error: No server at http://127.0.0.1:9: start one with `noisemill up`, or set NOISEMILL_URL.\n"
    )


@pytest.fixture
def endless(little: LittleServer) -> dict[str, str]:
    """An environment whose server has one job, which never ends."""
    little.app = JobServer(log=finished_log()[:5], job=job_view("running"))
    return {**os.environ, "NOISEMILL_URL": little.url, "NOISEMILL_API_KEY": "nm_secret", "TERM": "xterm"}


def test_an_interrupt_ends_the_watching_but_not_the_job(little: LittleServer, endless: dict[str, str]):
    command = [sys.executable, "-m", "noisemill", "jobs", "watch", JOB]
    with subprocess.Popen(command, cwd=REPOSITORY, env=endless, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stderr
        assert "training" in _read_until(watching.stderr.readline, "3/5")
        watching.send_signal(signal.SIGINT)
        said = watching.stderr.read()

    assert watching.returncode == 130
    assert f"{JOB} goes on" in said and f"noisemill jobs cancel {JOB}" in said
    assert not any(request.method == "POST" for request in little.requests)


def test_on_a_terminal_a_bar_shows_loss_and_rate(little: LittleServer):
    log = finished_log()
    log[4]["data"] |= {"loss": 12.25, "rate": 3.0, "eta_seconds": 61}
    little.app = JobServer(log=log[:5], job=job_view("running"))
    environment = {**os.environ, "NOISEMILL_URL": little.url, "NOISEMILL_API_KEY": "nm_secret", "TERM": "xterm"}
    near, far = pty.openpty()
    command = [sys.executable, "-m", "noisemill", "jobs", "watch", JOB]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=far) as watching:
        os.close(far)
        shown = _read_until(lambda: os.read(near, 4096).decode(errors="replace"), "12.25")
        little.app = JobServer()
    os.close(near)

    assert watching.returncode == 0
    assert "━" in shown


def _read_until(read: Callable[[], str], text: str) -> str:
    seen = ""
    while text not in seen:
        seen += read()
    return seen


def test_a_job_of_an_unknown_shape_is_still_shown(little: LittleServer, monkeypatch: pytest.MonkeyPatch):
    """Figures are whatever a family reports."""
    strange = event(3, step=1, steps=2, loss="high", rate=None, phase=None)
    little.app = JobServer(log=[*finished_log()[:2], strange, event(4, "job.state", state="succeeded")])
    monkeypatch.setenv("NOISEMILL_URL", little.url)

    assert "1/2" in _run("jobs", "watch", JOB).stderr


def test_nothing_is_stopped_where_nothing_runs(tmp_path: Path):
    result = _run("down", "--data-dir", str(tmp_path / "none"), "--json")

    assert json.loads(result.stdout) == {"stopped": []}


def test_the_list_is_that_of_the_client(run: Run, real: Client):
    listed = json.loads(run("jobs", "list", "--limit", "500", "--json").stdout)

    assert [job["id"] for job in listed] == [job.id for job in real.jobs()]


def test_weights_are_averaged_anew_only_where_a_training_left_what_that_needs(run: Run, hand: Hand, train: list[str]):
    run(*train, "--no-wait")
    hand.train(hand.claim("train"))

    refused = run("reaverage", "digits", "--ema-length", "0.07", exit_code=1)

    assert "no training with ema: power made" in refused.stderr


def test_a_model_that_another_library_has_no_words_for_is_not_exported(run: Run, hand: Hand, train: list[str]):
    run(*train, "--no-wait")
    hand.train(hand.claim("train"))

    refused = run("export", "digits", "--format", "diffusers", "--out", "out", exit_code=1)

    assert "/spec/model: a model of the family vae cannot be exported as diffusers" in refused.stderr


def test_files_of_an_export_that_is_not_waited_for_cannot_be_downloaded(run: Run):
    assert "only after waiting" in run("export", "digits", "--out", "out", "--no-wait", exit_code=2).stderr
