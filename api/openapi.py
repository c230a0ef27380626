"""The API's own description (OpenAPI 3.1): what FastAPI derives, plus problems, bodies, and an example of each body."""

import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from api import examples
from api.errors import PROBLEM_TYPE
from api.intake import DatasetForm
from shared.specs.gate import AliasRequest
from shared.wire import DatasetUpload, JobRequest, Problem

VERSION: Final = "0.1.0"
DESCRIPTION: Final = """\
Train generative models and draw samples from them, asynchronously: a job is accepted at once, workers run it, and
its artifacts are fetched from object storage by presigned URLs.

Every error is a problem document (RFC 9457) whose `errors` name the wrong fields by JSON Pointer.
"""
TAGS: Final[list[dict[str, Any]]] = [
    {"name": "jobs", "description": "Work to be done once, and its life."},
    {"name": "artifacts", "description": "What jobs made."},
    {"name": "datasets", "description": "What models learn from, or are made of."},
    {"name": "models", "description": "Registered names, their immutable versions, and aliases."},
    {"name": "workers", "description": "Who does the work."},
    {"name": "meta", "description": "The service's own rules, as data."},
    {"name": "health", "description": "For orchestrators and Prometheus; no key needed."},
]

_REF: Final = "#/components/schemas/{model}"
_VALIDATION_ERRORS: Final = ("HTTPValidationError", "ValidationError")
_RETRY_AFTER: Final = {
    "Retry-After": {"description": "Seconds after which to ask again.", "schema": {"type": "integer", "minimum": 1}}
}
_REFUSALS: Final[Mapping[HTTPStatus, frozenset[str]]] = {
    HTTPStatus.CONFLICT: frozenset(
        {"submitJob", "completeDataset", "pauseJob", "resumeJob", "retryJob", "reproduceJob", "eraseJob", "putAlias"}
    ),
    HTTPStatus.PRECONDITION_FAILED: frozenset({"putAlias", "deleteAlias"}),
    HTTPStatus.TOO_MANY_REQUESTS: frozenset(
        {"submitJob", "resumeJob", "retryJob", "reproduceJob", "createDataset", "completeDataset"}
    ),
    HTTPStatus.GONE: frozenset({"submitJob", "getArtifact", "getArtifactContent", "putAlias"}),
}
"""Which operations refuse what; 410 besides for all that is done with one job."""


def install(app: FastAPI) -> None:
    """Make ``app.openapi()`` return the whole description."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = describe


def _describe(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    schemas = document["components"]["schemas"]
    for name in _VALIDATION_ERRORS:
        schemas.pop(name, None)
    _add_schemas(schemas)
    _add_bodies(document["paths"])
    for path, operation in _operations(document):
        _add_problems(path, operation)
        for status, response in operation["responses"].items():
            _add_examples(operation["operationId"], status, response)
    return document


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for operation in item.values():
            yield path, operation


def _add_schemas(schemas: dict[str, Any]) -> None:
    """Models that FastAPI does not see, because we read bodies and write problems ourselves."""
    _, models = models_json_schema(
        [(Problem, "serialization"), (DatasetUpload, "validation"), (AliasRequest, "validation")], ref_template=_REF
    )
    schemas.update(models["$defs"])
    request = TypeAdapter(JobRequest).json_schema(ref_template=_REF)
    schemas.update(request.pop("$defs"))
    schemas["JobRequest"] = request
    form = DatasetForm.model_json_schema(ref_template=_REF)
    form["properties"]["file"] = {
        "type": "string",
        "format": "binary",
        "description": "Zip or tar of images or a model, zip of `.wav`, `.npz`, `.txt` or `.jsonl`; told by its name.",
    }
    form["required"] = ["name", "file"]
    schemas["DatasetForm"] = form


def _add_bodies(paths: Mapping[str, Any]) -> None:
    paths["/v1/jobs"]["post"]["requestBody"] = _body(
        {
            "application/json": (
                "JobRequest",
                {"examples": {name: {"value": one} for name, one in examples.JOB_REQUESTS.items()}},
            )
        }
    )
    paths["/v1/datasets"]["post"]["requestBody"] = _body(
        {
            "multipart/form-data": ("DatasetForm", {"example": examples.DATASET_FORM}),
            "application/json": ("DatasetUpload", {"example": examples.DATASET_UPLOAD}),
        }
    )
    paths["/v1/models/{name}/aliases/{alias}"]["put"]["requestBody"] = _body(
        {"application/json": ("AliasRequest", {"example": examples.ALIAS_REQUEST})}
    )


def _body(kinds: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    content = {kind: {"schema": {"$ref": _REF.format(model=name)}, **shown} for kind, (name, shown) in kinds.items()}
    return {"required": True, "content": content}


def _add_problems(path: str, operation: dict[str, Any]) -> None:
    operation["responses"].pop("422", None)
    statuses = [HTTPStatus.INTERNAL_SERVER_ERROR]
    if path.startswith("/v1/"):
        statuses += [HTTPStatus.UNAUTHORIZED, HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.SERVICE_UNAVAILABLE]
    if any(operation.get("security", [{}])[0].values()):
        statuses.append(HTTPStatus.FORBIDDEN)
    if "{" in path:
        statuses.append(HTTPStatus.NOT_FOUND)
    if "requestBody" in operation:
        statuses += [HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNSUPPORTED_MEDIA_TYPE]
    statuses += [status for status, refusing in _REFUSALS.items() if operation["operationId"] in refusing]
    if path.startswith("/v1/jobs/{job_id}"):
        statuses.append(HTTPStatus.GONE)
    for status in sorted(statuses):
        operation["responses"].setdefault(str(int(status)), _problem(operation["operationId"], status))


def _problem(operation: str, status: HTTPStatus) -> dict[str, Any]:
    example = examples.REFUSALS.get((operation, int(status))) or examples.PROBLEMS.get(status, examples.PROBLEM)
    described: dict[str, Any] = {"description": status.phrase}
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        described["headers"] = _RETRY_AFTER
    schema = {"$ref": _REF.format(model="Problem")}
    return described | {"content": {PROBLEM_TYPE: {"schema": schema, "example": example}}}


def _add_examples(operation: str, status: str, response: dict[str, Any]) -> None:
    for kind, media in response.get("content", {}).items():
        name = media.get("schema", {}).get("$ref", "").rpartition("/")[2]
        if (operation, status) in examples.ANSWERS:
            media["example"] = examples.ANSWERS[operation, status]
        elif kind == "text/event-stream":
            media["example"] = examples.EVENT_STREAM
        elif kind == "text/plain":
            media |= {"schema": {"type": "string"}, "example": "ok\n"}
        elif item := re.fullmatch(r"Page_(\w+)_", name):
            media["example"] = {"data": [examples.VIEWS[item[1]]], "next_cursor": None, "has_more": False}
        elif name in examples.VIEWS:
            media["example"] = examples.VIEWS[name]
