"""The SDK: submit jobs, follow them to their end, move data in and out. Typed with the server's own models.

from noisemill import Client

client = Client()
job = client.wait(client.generate(model="digits", task="generate", num_samples=64).id)
for artifact in client.artifacts(job.id):
    client.download(artifact, "samples/")
"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from noisemill import downloads, uploads
from noisemill.aliases import Aliases
from noisemill.answers import ViewT, header, outcome, parse, progress_of, quoted
from noisemill.discovery import find_server
from noisemill.errors import ApiError, UnexpectedAnswer
from noisemill.following import Follower
from noisemill.pages import fetch, fetch_all
from noisemill.transport import Transport, plain_client
from shared.specs import AnyTrainSpec
from shared.specs.spec import DatasetKind
from shared.wire import (
    AnyJobRequest,
    ArtifactView,
    AttemptView,
    DatasetUpload,
    DatasetView,
    EventView,
    JobStateName,
    JobTypeName,
    JobView,
    ModelVersionView,
    ModelView,
    ProgressView,
    WorkerView,
)

OnEvent = Callable[[EventView], None]
OnProgress = Callable[[ProgressView], None]

_LONGEST_PREFER_WAIT = 60


class Client:
    """A connection to one Noisemill server. Usable as a context manager; not shared between threads.

    Args:
        url: address of the API; NOISEMILL_URL, or the nearest running local stack, when left out.
        api_key: NOISEMILL_API_KEY, or the local stack's key, when left out.
        timeout: seconds a single answer may take.
        max_retries: how often a request is sent again after a passing failure.
        patience: seconds that ``wait`` and ``events`` bear a server that has gone away.

    Raises:
        ServerUnreachable: no address is known.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        max_retries: int = 5,
        patience: float = 120.0,
    ) -> None:
        self._transport = Transport(find_server(url, api_key), timeout=timeout, max_retries=max_retries)
        self._storage = plain_client(timeout)
        self._patience = patience
        self.aliases = Aliases(self._transport)
        """Names for versions of models."""

    @property
    def url(self) -> str:
        """Address of the server."""
        return self._transport.server.url

    def close(self) -> None:
        self._transport.close()
        self._storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Jobs

    def submit(
        self,
        request: AnyJobRequest | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        wait: float | None = None,
    ) -> JobView:
        """Submit a job. Sent again after a lost answer, it is still one job.

        Args:
            request: a typed request, or the JSON body as it is (checked by the server alone).
            idempotency_key: makes repeated calls one job, too; each call is its own when left out.
            wait: seconds the server may take to answer with the finished job (at most 60).

        Raises:
            ApiError: the server refused it; ``error.problem.errors`` names the fields.
        """
        body = dict(request) if isinstance(request, Mapping) else request.model_dump(mode="json", exclude_unset=True)
        headers = {"Idempotency-Key": header(idempotency_key or uuid.uuid4().hex)}
        timeout = self._transport.timeout
        if wait is not None:
            seconds = max(0, min(round(wait), _LONGEST_PREFER_WAIT))
            headers["Prefer"] = f"wait={seconds}"
            timeout += seconds
        answer = self._transport.request(
            "POST", "/v1/jobs", repeatable=True, json=body, headers=headers, timeout=timeout
        )
        return parse(JobView, answer.content)

    def train(self, spec: AnyTrainSpec | None = None, /, *, wait: float | None = None, **fields: Any) -> JobView:
        """Train a model: ``train(family="vae", dataset=dataset.id, model="digits", steps=1200)``."""
        return self._submit_spec("train", spec, fields, wait)

    def generate(self, *, wait: float | None = None, task: str = "generate", **fields: Any) -> JobView:
        """Use a trained model: ``generate(model="digits", num_samples=64, seed=0)``."""
        return self._submit_spec("generate", None, {"task": task, **fields}, wait)

    def evaluate(self, *, wait: float | None = None, **fields: Any) -> JobView:
        """Measure a trained model: ``evaluate(model="digits", dataset=dataset.id)``; figures are in its ``result``."""
        return self._submit_spec("evaluate", None, fields, wait)

    def reaverage(self, *, wait: float | None = None, **fields: Any) -> JobView:
        """Average a model's weights over another length: ``reaverage(model="digits@1", ema_length=0.07)``."""
        return self._submit_spec("reaverage", None, fields, wait)

    def export(self, *, wait: float | None = None, **fields: Any) -> JobView:
        """Write a model as another library's files, its artifacts: ``export(model="digits@1", format="diffusers")``."""
        return self._submit_spec("export", None, fields, wait)

    def import_model(self, *, wait: float | None = None, **fields: Any) -> JobView:
        """Register an uploaded model of another library: ``import_model(dataset=dataset.id, model="faces")``."""
        return self._submit_spec("import", None, fields, wait)

    def job(self, job_id: str) -> JobView:
        """The job as it is now."""
        return self._get(JobView, f"/v1/jobs/{quoted(job_id)}")

    def jobs(
        self,
        *,
        state: JobStateName | None = None,
        type: JobTypeName | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Iterator[JobView]:
        """Jobs in this state, of this type, with these labels, newest first, fetched page by page."""
        filters = {f"label.{name}": value for name, value in (labels or {}).items()}
        return self._pages(JobView, "/v1/jobs", {**filters, "state": state, "type": type})

    def cancel(self, job_id: str) -> JobView:
        """Ask for a stop. Idempotent; a running job is ``canceling`` until its device is free."""
        return self._change(job_id, "cancel")

    def pause(self, job_id: str) -> JobView:
        """Free the worker and keep what was done. Idempotent; ``pausing`` until a checkpoint is written."""
        return self._change(job_id, "pause")

    def resume(self, job_id: str) -> JobView:
        """Let a paused job go on exactly where it was, once a worker is free. Idempotent."""
        return self._change(job_id, "resume")

    def retry(self, job_id: str) -> JobView:
        """The new job that tries one again that failed, expired or was canceled. Idempotent: there is one of each."""
        return self._change(job_id, "retry")

    def reproduce(self, job_id: str, *, idempotency_key: str | None = None) -> JobView:
        """The new job that does again what one did that succeeded, and compares the bytes: ``result["reproduction"]``.

        Sent again after a lost answer, it is still one job; with ``idempotency_key`` repeated calls are, too.
        """
        headers = {"Idempotency-Key": header(idempotency_key or uuid.uuid4().hex)}
        return self._change(job_id, "reproduce", headers=headers)

    def erase(self, job_id: str) -> None:
        """Erase an ended job with its events and artifacts; what models and datasets are made of stays. Idempotent."""
        try:
            self._transport.request("DELETE", f"/v1/jobs/{quoted(job_id)}", repeatable=True)
        except ApiError as error:
            if error.code != "gone":
                raise

    def events(self, job_id: str, after: int = 0) -> Iterator[EventView]:
        """Every event after number ``after``, once and in order, until the job has ended.

        Broken connections are replaced without a gap or a double.
        """
        return self._follower(job_id, after=after).events()

    def wait(
        self,
        job_id: str,
        timeout: float | None = None,
        *,
        on_event: OnEvent | None = None,
        on_progress: OnProgress | None = None,
    ) -> JobView:
        """Return the job once it has succeeded.

        Raises:
            JobFailed, JobCanceled: it ended without a result.
            WaitTimeout: ``timeout`` seconds have passed; the job goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for event in self._follower(job_id, deadline=deadline).events():
            if on_event:
                on_event(event)
            if on_progress and event.type == "job.progress":
                on_progress(progress_of(event))
        return outcome(self.job(job_id), timeout)

    def attempts(self, job_id: str) -> list[AttemptView]:
        """Every try at the job, first to last: who ran it, when, and how it ended."""
        return list(self._pages(AttemptView, f"/v1/jobs/{quoted(job_id)}/attempts"))

    # Artifacts

    def artifacts(self, job_id: str, *, kind: str | None = None) -> list[ArtifactView]:
        """What the job has made so far (of this kind), oldest first, each with a presigned URL."""
        return list(self._pages(ArtifactView, f"/v1/jobs/{quoted(job_id)}/artifacts", {"kind": kind, "limit": 200}))

    def artifact(self, artifact_id: str) -> ArtifactView:
        """One artifact, with a fresh presigned URL."""
        return self._get(ArtifactView, f"/v1/artifacts/{quoted(artifact_id)}")

    def download(
        self,
        artifact: ArtifactView | str,
        path: str | PathLike[str] = ".",
        *,
        on_bytes: downloads.OnBytes | None = None,
    ) -> Path:
        """Fetch an artifact into a file, or under its own name into a folder; returns the file's path.

        The file appears only when it is whole and its SHA-256 is right. A file that is already there
        with these bytes is left alone.

        Raises:
            TransferFailed: the bytes did not arrive whole.
            UnsafeName: the artifact's name would leave the folder.
        """
        view = self.artifact(artifact) if isinstance(artifact, str) else artifact
        if str(path).endswith(("/", "\\")):
            Path(path).mkdir(parents=True, exist_ok=True)
        target = downloads.target(view, Path(path))
        return downloads.Download(self._storage, view, renew=lambda: self.artifact(view.id), on_bytes=on_bytes).into(
            target
        )

    # Datasets

    def upload_dataset(
        self,
        path: str | PathLike[str],
        name: str | None = None,
        *,
        modality: DatasetKind | None = None,
        resolution: int | None = None,
        direct: bool | None = None,
        on_bytes: downloads.OnBytes | None = None,
    ) -> DatasetView:
        """Upload a file, or a folder as a zip; the returned dataset is being ingested (``wait_dataset``).

        Args:
            path: zip or tar of images, one image, ``.npz``, ``.txt``, ``.jsonl``, zip of ``.wav``, or a folder, of
                these or of a model of diffusers (``modality="model"``).
            name: what to call it; the file's name without suffix when left out.
            modality: what it must turn out to be.
            resolution: side length that images are brought to.
            direct: straight to storage rather than through the API; by size when left out.
            on_bytes: told of every block that was sent.
        """
        with uploads.as_file(Path(path), modality) as file:
            size = file.stat().st_size
            announced = DatasetUpload(
                name=name or file.name.partition(".")[0] or file.name,
                filename=file.name,
                size_bytes=size,
                modality=modality,
                resolution=resolution,
            )
            if direct if direct is not None else size > uploads.DIRECT_ABOVE_BYTES:
                return self._upload_direct(file, announced, on_bytes)
            return self._upload_through(file, announced, on_bytes)

    def wait_dataset(
        self, dataset_id: str, timeout: float | None = None, *, on_progress: OnProgress | None = None
    ) -> DatasetView:
        """Return the dataset once it is ready.

        Raises:
            JobFailed: its ingestion failed; the message names the file and the reason.
            WaitTimeout: ``timeout`` seconds have passed; the ingestion goes on.
        """
        dataset = self.dataset(dataset_id)
        if dataset.job_id is not None and dataset.state != "ready":
            self.wait(dataset.job_id, timeout, on_progress=on_progress)
            dataset = self.dataset(dataset_id)
        return dataset

    def dataset(self, dataset_id: str) -> DatasetView:
        return self._get(DatasetView, f"/v1/datasets/{quoted(dataset_id)}")

    def datasets(self) -> Iterator[DatasetView]:
        """All datasets, newest first, fetched page by page."""
        return self._pages(DatasetView, "/v1/datasets")

    # Models and workers

    def models(self) -> Iterator[ModelView]:
        """All registered names, each with its newest version."""
        return self._pages(ModelView, "/v1/models")

    def model(self, name: str) -> ModelView:
        return self._get(ModelView, f"/v1/models/{quoted(name)}")

    def model_versions(self, name: str) -> Iterator[ModelVersionView]:
        """All versions of a model, newest first."""
        return self._pages(ModelVersionView, f"/v1/models/{quoted(name)}/versions")

    def model_version(self, ref: str) -> ModelVersionView:
        """The version that ``name@version`` or ``name@alias`` names, or the newest of ``name``."""
        name, _, which = ref.partition("@")
        if which.isdecimal():
            number = which
        else:
            number = str(self.aliases.get(ref).version if which else self.model(name).latest)
        return self._get(ModelVersionView, f"/v1/models/{quoted(name)}/versions/{quoted(number)}")

    def workers(self) -> list[WorkerView]:
        """The workers that were heard of lately."""
        return list(self._pages(WorkerView, "/v1/workers"))

    # Beneath

    def _submit_spec(self, type: str, spec: AnyTrainSpec | None, fields: dict[str, Any], wait: float | None) -> JobView:
        given = {} if spec is None else spec.model_dump(mode="json", exclude_unset=True)
        return self.submit({"type": type, "spec": {**given, **fields}}, wait=wait)

    def _change(self, job_id: str, action: str, *, headers: Mapping[str, str] | None = None) -> JobView:
        path = f"/v1/jobs/{quoted(job_id)}/{action}"
        answer = self._transport.request("POST", path, repeatable=True, headers=headers)
        return parse(JobView, answer.content)

    def _follower(self, job_id: str, *, after: int = 0, deadline: float | None = None) -> Follower:
        path = f"/v1/jobs/{quoted(job_id)}"
        return Follower(self._transport, path, after=after, patience=self._patience, deadline=deadline)

    def _upload_through(self, file: Path, announced: DatasetUpload, on_bytes: downloads.OnBytes | None) -> DatasetView:
        fields = announced.model_dump(mode="json", exclude_none=True, include={"name", "modality", "resolution"})
        with file.open("rb") as body:
            part = (announced.filename, uploads.Counted(body, on_bytes), "application/octet-stream")
            answer = self._transport.request(
                "POST",
                "/v1/datasets",
                repeatable=False,
                data={key: str(value) for key, value in fields.items()},
                files={"file": part},
            )
        return parse(DatasetView, answer.content)

    def _upload_direct(self, file: Path, announced: DatasetUpload, on_bytes: downloads.OnBytes | None) -> DatasetView:
        body = announced.model_dump(mode="json", exclude_none=True)
        dataset = parse(
            DatasetView, self._transport.request("POST", "/v1/datasets", repeatable=False, json=body).content
        )
        if dataset.upload is None:
            raise UnexpectedAnswer(f"The server at {self.url} gave no address to upload {dataset.id} to.")
        uploads.put(self._storage, dataset.upload, file, on_bytes)
        answer = self._transport.request("POST", f"/v1/datasets/{quoted(dataset.id)}/complete", repeatable=True)
        return parse(DatasetView, answer.content)

    def _get(self, view: type[ViewT], path: str) -> ViewT:
        return fetch(self._transport, view, path)

    def _pages(self, view: type[ViewT], path: str, filters: Mapping[str, Any] | None = None) -> Iterator[ViewT]:
        return fetch_all(self._transport, view, path, filters)
