"""The API's description says what is true: examples fit their schemas and are accepted by the real parser."""

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter

from api import examples
from api.app import create_app
from api.intake import DatasetForm
from shared.settings import Settings
from shared.wire import DatasetUpload, JobRequest


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Made without any server: the address of none is even valid."""
    settings = {"database": {"url": "postgresql://nowhere"}, "broker": {"url": "redis://nowhere"}}
    return create_app(Settings.model_validate({**settings, "s3": {"access_key": "a", "secret_key": "b"}})).openapi()


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every body of every operation: where it is, and its description."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            sent = {"request": operation["requestBody"]} if "requestBody" in operation else {}
            for name, described in (sent | operation["responses"]).items():
                for kind, media in described.get("content", {}).items():
                    yield f"{method} {path} {name} {kind}", media


def shown(media: dict[str, Any]) -> list[Any]:
    """The examples of a body."""
    one = [media["example"]] if "example" in media else []
    return one + [example["value"] for example in media.get("examples", {}).values()]


def test_it_is_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_every_body_has_an_example(document: dict[str, Any]) -> None:
    assert [where for where, media in bodies(document) if not shown(media)] == []


def test_every_example_fits_its_schema(document: dict[str, Any]) -> None:
    count = 0

    for where, media in bodies(document):
        for example in shown(media):
            validator = Draft202012Validator({**media["schema"], "components": document["components"]})
            assert [error.message for error in validator.iter_errors(example)] == [], where
            count += 1

    assert count > 100


def test_a_wrong_example_would_not_fit(document: dict[str, Any]) -> None:
    media = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    wrong = examples.JOB_REQUESTS["train"] | {"spec": {"family": "vae", "steps": -1}}

    assert list(Draft202012Validator({**media["schema"], "components": document["components"]}).iter_errors(wrong))


@pytest.mark.parametrize("name", examples.JOB_REQUESTS)
def test_the_parser_accepts_every_job_example(name: str) -> None:
    TypeAdapter(JobRequest).validate_python(examples.JOB_REQUESTS[name], strict=True)


def test_the_parser_accepts_the_dataset_examples() -> None:
    DatasetUpload.model_validate(examples.DATASET_UPLOAD, strict=True)
    DatasetForm.model_validate({name: value for name, value in examples.DATASET_FORM.items() if name != "file"})


def test_every_view_has_one_example() -> None:
    """The examples are views of the server, with no field that views do not have."""
    from shared import about, wire

    for name, example in examples.VIEWS.items():
        view = getattr(about, name, None) or getattr(wire, name)
        assert set(example) <= set(view.model_fields), name
        view.model_validate(example)


def test_every_operation_is_named_tagged_and_explained(document: dict[str, Any]) -> None:
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    names = [operation["operationId"] for operation in operations]

    assert len(set(names)) == len(names) >= 20
    assert all(operation["tags"] and len(operation["description"]) > 20 for operation in operations)
    assert {tag for operation in operations for tag in operation["tags"]} == {tag["name"] for tag in document["tags"]}


def test_every_error_is_a_problem(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        if path == "/readyz":
            continue  # says what is away, in its own words
        for operation in item.values():
            wrong = {status: one["content"] for status, one in operation["responses"].items() if status >= "400"}
            assert all(list(content) == ["application/problem+json"] for content in wrong.values()), path
            assert "500" in wrong and ("401" in wrong) == path.startswith("/v1/"), path


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
            node = list(node.values())
        if isinstance(node, list):
            for one in node:
                yield from references(one)

    wanted = {name.removeprefix("#/components/schemas/") for name in references(document)}
    assert wanted - set(document["components"]["schemas"]) == set()
    assert "HTTPValidationError" not in document["components"]["schemas"]
