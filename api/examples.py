"""One example of every body, for the OpenAPI document. A test holds each against its schema and the parser."""

from collections.abc import Mapping
from typing import Any, Final

_JOB = "job_0198f3a2b7c97d10a6c1d2e3f4a5b6c7"
_RETRY = "job_0198f3b2b7c97d10a6c1d2e3f4a5b6c8"
_REPRODUCTION = "job_0198f3b4b7c97d10a6c1d2e3f4a5b6cb"
_INGEST = "job_0198f3a2a1b27c3d8e4f5a6b7c8d9e0f"
_DATASET = "ds_0198f3a29f3e7a1b9c8d7e6f5a4b3c2d"
_MODEL = "mdl_0198f3a2c0de7b5a8f9e0d1c2b3a4f5e"
_ARTIFACT = "art_0198f3a2d4c37e2f9a8b7c6d5e4f3a2b"
_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_URL = "http://localhost:8000"
_S3 = "http://localhost:9000/noisemill"

_TRAIN_SPEC: Final = {"family": "vae", "dataset": _DATASET, "model": "digits", "steps": 1200, "latent_dim": 16}

_STATE_EVENT: Final = {
    "seq": 2,
    "type": "job.state",
    "data": {"state": "running", "state_version": 2, "attempt": 1, "worker": "train-1@gpu01"},
    "created_at": "2026-01-05T09:30:01.250000Z",
}

_ATTEMPT: Final = {
    "number": 1,
    "worker": "train-1@gpu01",
    "started_at": "2026-01-05T09:30:01.250000Z",
    "ended_at": None,
    "outcome": None,
    "error": None,
}

_LOST: Final = {
    "code": "worker_lost",
    "message": "the worker stopped answering; its lease ran out",
    "retryable": True,
    "causes": [],
}

_JOB_VIEW: Final = {
    "id": _JOB,
    "type": "train",
    "state": "running",
    "state_version": 14,
    "summary": "train vae digits",
    "spec": _TRAIN_SPEC,
    "priority": "normal",
    "labels": {"project": "mnist"},
    "attempt": 1,
    "max_attempts": 3,
    "attempts": [_ATTEMPT],
    "phase": "training",
    "progress": {
        "value": 0.25,
        "step": 300,
        "steps": 1200,
        "figures": {"loss": 112.4, "rate": 41.5, "eta_seconds": 21.7},
    },
    "queue": None,
    "metrics": {"queue_ms": 240, "load_ms": None, "execution_ms": None, "upload_ms": None, "device_seconds": 7.3},
    "error": None,
    "result": None,
    "created_at": "2026-01-05T09:30:01.010000Z",
    "started_at": "2026-01-05T09:30:01.250000Z",
    "completed_at": None,
    "cancel_requested_at": None,
    "retry_of": None,
    "retried_by": None,
    "needs": {},
    "reproduces": None,
    "urls": {
        "self": f"{_URL}/v1/jobs/{_JOB}",
        **{
            name: f"{_URL}/v1/jobs/{_JOB}/{name}"
            for name in ("events", "attempts", "artifacts", "cancel", "pause", "resume", "retry", "reproduce")
        },
        "web": f"{_URL}/jobs/{_JOB}",
    },
}

_QUEUED: Final = _JOB_VIEW | {
    "state": "queued",
    "state_version": 1,
    "attempt": 0,
    "attempts": [],
    "phase": None,
    "progress": {"value": 0.0, "step": 0, "steps": 0, "figures": {}},
    "queue": {"position": 4, "reason": "behind_others", "eta": {"p50": 61.5, "p90": 118.0}, "waits_for": []},
    "metrics": {"queue_ms": None, "load_ms": None, "execution_ms": None, "upload_ms": None, "device_seconds": None},
    "started_at": None,
}

_CAUSE: Final = {"attempt": 1, "code": "worker_lost", "message": "the worker stopped answering; its lease ran out"}

_FAILED: Final = _JOB_VIEW | {
    "state": "failed",
    "state_version": 41,
    "attempt": 2,
    "max_attempts": 2,
    "attempts": [
        _ATTEMPT | {"number": number, "ended_at": "2026-01-05T09:31:01.250000Z", "outcome": "lost", "error": _LOST}
        for number in (1, 2)
    ],
    "phase": None,
    "error": _LOST | {"causes": [_CAUSE, _CAUSE | {"attempt": 2}]},
    "completed_at": "2026-01-05T09:32:31.000000Z",
    "retried_by": _RETRY,
}

_VERSION_VIEW: Final = {
    "model": "digits",
    "version": 1,
    "ref": "digits@1",
    "family": "vae",
    "spec": _TRAIN_SPEC,
    "info": {"shape": [1, 28, 28]},
    "metrics": {"held_out": {"elbo": -101.7}},
    "tasks": ["generate", "interpolate", "reconstruct"],
    "weights_sha256": _SHA256,
    "size_bytes": 1843200,
    "job_id": _JOB,
    "dataset_id": _DATASET,
    "created_at": "2026-01-05T09:30:31.000000Z",
}

_EVALUATION: Final = "job_0198f3b4b7c97d10a6c1d2e3f4a5b6c9"
_BOUND: Final = {"metric": "frechet_distance", "at_most": 12.0}
_NO_WORSE: Final = {"metric": "coverage", "no_worse_than_current": True}
_CHECK: Final = {
    "bound": _BOUND,
    "passed": True,
    "reason": "frechet_distance is 10.4, the upper end of its interval 11.2; at most 12 is asked",
    "evaluation": _EVALUATION,
    "value": 10.4,
    "confidence_95": [9.6, 11.2],
}
_BELOW: Final = {
    "bound": _NO_WORSE,
    "passed": False,
    "reason": "coverage is 0.81, and 0.87 of the current version; higher is better",
    "evaluation": _EVALUATION,
    "value": 0.81,
    "confidence_95": [0.78, 0.84],
    "current_value": 0.87,
    "current_evaluation": "job_0198f3a3b7c97d10a6c1d2e3f4a5b6ca",
}
_ALIAS_VIEW: Final = {
    "model": "digits",
    "alias": "production",
    "ref": "digits@production",
    "version": 3,
    "gate": [_BOUND, _NO_WORSE],
    "created_at": "2026-01-05T10:02:31.000000Z",
}

_DATASET_VIEW: Final = {
    "id": _DATASET,
    "name": "mnist",
    "state": "ready",
    "modality": "image",
    "count": 5000,
    "digest": _SHA256,
    "info": {"shape": [1, 28, 28]},
    "error": None,
    "job_id": _INGEST,
    "created_at": "2026-01-05T09:29:12.000000Z",
    "upload": None,
    "urls": {"self": f"{_URL}/v1/datasets/{_DATASET}", "complete": f"{_URL}/v1/datasets/{_DATASET}/complete"},
}

_ANNOUNCED_DATASET: Final = _DATASET_VIEW | {
    "state": "uploading",
    "modality": None,
    "count": None,
    "digest": None,
    "info": {},
    "job_id": None,
    "upload": {
        "method": "PUT",
        "url": f"{_S3}/datasets/0198f3a29f3e7a1b9c8d7e6f5a4b3c2d/source?X-Amz-Signature=…",
        "headers": {"Content-Length": "52428800"},
        "expires_at": "2026-01-05T09:44:12+00:00",
    },
}

JOB_REQUESTS: Final[Mapping[str, Any]] = {
    "train": {"type": "train", "spec": _TRAIN_SPEC, "priority": "normal", "labels": {"project": "mnist"}},
    "generate": {"type": "generate", "spec": {"model": "digits@1", "task": "generate", "num_samples": 64, "seed": 0}},
    "reconstruct": {
        "type": "generate",
        "spec": {"model": "digits", "task": "reconstruct", "dataset": _DATASET, "num_samples": 16},
    },
    "generate_by_alias": {
        "type": "generate",
        "spec": {"model": "digits@production", "task": "generate", "num_samples": 16, "seed": 0},
    },
    "train_on_what_a_job_will_make": {
        "type": "train",
        "spec": {"family": "diffusion", "dataset": _DATASET, "model": "drawn-digits", "autoencoder": _JOB},
    },
    "evaluate": {"type": "evaluate", "spec": {"model": "digits", "dataset": _DATASET, "num_samples": 1000}},
    "export": {"type": "export", "spec": {"model": "digits@1", "format": "diffusers"}},
    "import": {"type": "import", "spec": {"dataset": _DATASET, "model": "faces"}},
    "reaverage": {"type": "reaverage", "spec": {"model": "digits@1", "ema_length": 0.07}},
    "interpolate": {
        "type": "generate",
        "spec": {"model": "digits", "task": "interpolate", "num_pairs": 4, "num_points": 8},
        "priority": "high",
        "start_deadline_seconds": 3600,
    },
}

DATASET_UPLOAD: Final = {"name": "mnist", "filename": "mnist.zip", "size_bytes": 52428800, "modality": "image"}

DATASET_FORM: Final = {"name": "mnist", "modality": "image", "resolution": 28, "file": "(the bytes of mnist.zip)"}

ALIAS_REQUEST: Final = {"version": 3, "gate": [_BOUND, _NO_WORSE], "evaluation": _EVALUATION}

PROBLEM: Final = {
    "type": "about:blank",
    "title": "Unprocessable Entity",
    "status": 422,
    "detail": "Input should be less than or equal to 10000000",
    "instance": "/v1/jobs",
    "code": "validation_failed",
    "errors": [{"pointer": "/spec/steps", "detail": "Input should be less than or equal to 10000000"}],
    "request_id": "req_5f0c1d2e3a4b5c6d7e8f9a0b",
}

PROBLEMS: Final[Mapping[int, Any]] = {
    status: {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": instance,
        "code": code,
        "errors": [],
        "request_id": "req_5f0c1d2e3a4b5c6d7e8f9a0b",
    }
    for status, title, code, instance, detail in (
        (409, "Conflict", "invalid_state", f"/v1/jobs/{_JOB}/pause", "the job is succeeded: it cannot be paused"),
        (
            *(412, "Precondition Failed", "precondition_failed", "/v1/models/digits/aliases/production"),
            "digits@production has changed, or is not there",
        ),
        (410, "Gone", "gone", f"/v1/jobs/{_JOB}", f"the job was erased: {_JOB}"),
        (429, "Too Many Requests", "queue_full", "/v1/jobs", "10000 jobs are waiting already"),
        (503, "Service Unavailable", "unavailable", "/v1/jobs", "the database does not answer right now; try again"),
    )
}
"""By status; any other is shown by ``PROBLEM``."""

REFUSALS: Final[Mapping[tuple[str, int], Any]] = {
    ("putAlias", 409): PROBLEMS[409]
    | {
        "detail": "digits@3 does not pass the gate of production: 1 of 2 bounds do not hold",
        "instance": "/v1/models/digits/aliases/production",
        "code": "gate_failed",
        "errors": [{"pointer": "/version", "detail": _BELOW["reason"]}],
        "checks": [_CHECK, _BELOW],
    },
    ("reproduceJob", 409): PROBLEMS[409]
    | {
        "detail": f"the job cannot be run again: the dataset {_DATASET} is gone",
        "instance": f"/v1/jobs/{_JOB}/reproduce",
        "code": "not_reproducible",
    },
}
"""By operation and status, where the example of the status would not do."""

ANSWERS: Final[Mapping[tuple[str, str], Any]] = {
    ("createDataset", "201"): _ANNOUNCED_DATASET,
    ("submitJob", "202"): _QUEUED,
    ("listJobs", "200"): {"data": [_FAILED, _QUEUED], "next_cursor": None, "has_more": False},
    ("cancelJob", "202"): _JOB_VIEW | {"state": "canceling", "cancel_requested_at": "2026-01-05T09:30:08.000000Z"},
    ("cancelJob", "200"): _QUEUED | {"state": "canceled", "queue": None, "completed_at": "2026-01-05T09:30:08.000000Z"},
    ("pauseJob", "202"): _JOB_VIEW | {"state": "pausing"},
    ("pauseJob", "200"): _QUEUED | {"state": "paused", "queue": None},
    ("resumeJob", "200"): _QUEUED | {"state_version": 3},
    ("retryJob", "202"): _QUEUED | {"id": _RETRY, "retry_of": _JOB},
    ("retryJob", "200"): _JOB_VIEW | {"id": _RETRY, "retry_of": _JOB},
    ("reproduceJob", "202"): _QUEUED
    | {
        "id": _REPRODUCTION,
        "summary": "reproduce train vae digits",
        "reproduces": {
            "job_id": _JOB,
            "sha256": _SHA256,
            "reproducibility": "same_hardware",
            "fingerprint": {"torch": "2.13.0", "device": "NVIDIA H200", "num_threads": 8, "precision": "bf16"},
        },
    },
}
"""By operation and status, where the example of the view would not do."""

EVENT_STREAM: Final = (
    "retry: 2000\n\n"
    'id: 2\nevent: job.state\ndata: {"seq":2,"type":"job.state","data":{"state":"running","attempt":1},'
    '"created_at":"2026-01-05T09:30:01.250000Z"}\n\n'
)

VIEWS: Final[Mapping[str, Any]] = {
    "JobView": _JOB_VIEW,
    "AttemptView": _ATTEMPT,
    "EventView": _STATE_EVENT,
    "ArtifactView": {
        "id": _ARTIFACT,
        "job_id": _JOB,
        "attempt": 1,
        "kind": "sheet",
        "name": "samples.png",
        "size_bytes": 48213,
        "sha256": _SHA256,
        "media_type": "image/png",
        "details": {"columns": 8},
        "created_at": "2026-01-05T09:30:31.000000Z",
        "expires_at": None,
        "url": f"{_S3}/jobs/{_JOB}/1/samples.png?X-Amz-Signature=…",
        "url_expires_at": "2026-01-05T09:45:31.000000Z",
    },
    "DatasetView": _DATASET_VIEW,
    "ModelVersionView": _VERSION_VIEW,
    "ModelView": {
        "id": _MODEL,
        "name": "digits",
        "latest": 1,
        "aliases": {"production": 1},
        "created_at": "2026-01-05T09:30:31.000000Z",
        "latest_version": _VERSION_VIEW,
    },
    "AliasView": _ALIAS_VIEW,
    "AliasMoveView": {
        "id": "mov_0198f3b5c0de7b5a8f9e0d1c2b3a4f5e",
        "alias": "production",
        "from_version": 2,
        "to_version": 3,
        "gate": [_BOUND],
        "checks": [_CHECK],
        "key_id": "key_0198f3a0c0de7b5a8f9e0d1c2b3a4f5e",
        "key_hint": "nm_j…",
        "created_at": "2026-01-05T11:40:02.000000Z",
    },
    "WorkerView": {
        "name": "train-1@gpu01",
        "host": "gpu01",
        "queues": ["train"],
        "device": "cuda:0",
        "state": "busy",
        "job_id": _JOB,
        "seen_at": "2026-01-05T09:30:08.000000Z",
    },
    "FamilyView": {
        "family": "vae",
        "modality": "image",
        "tasks": ["generate"],
        "train": {"type": "object", "properties": {"latent_dim": {"type": "integer", "minimum": 1}}},
        "generate": {"generate": {"type": "object", "properties": {"num_samples": {"type": "integer"}}}},
    },
    "JobStatesView": {
        "initial": "queued",
        "final": ["succeeded", "failed", "canceled", "expired"],
        "moves": {"queued": ["running", "paused", "canceled", "expired"], "canceling": ["canceled"], "succeeded": []},
    },
    "ReadinessView": {"status": "degraded", "database": "ok", "broker": "away", "storage": "ok"},
}
"""By the name of the view."""
