"""What the door lets in, by name and content type."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from shared.errors import InvalidSpec, UnsupportedMedia
from shared.media import upload_kind
from shared.specs.ingest import IngestSpec

DATASET = "ds_" + "0" * 32


@pytest.mark.parametrize(
    ("filename", "content_type", "kind"),
    [
        ("a.zip", "application/zip", "zip archive"),
        ("A.ZIP", None, "zip archive"),
        ("a.tar.gz", "application/gzip", "tar archive"),
        ("a.b.tgz", "application/octet-stream", "tar archive"),
        ("a.npz", "application/octet-stream", "NumPy arrays"),
        ("a.txt", "text/plain; charset=utf-8", "text file"),
        ("a.jsonl", "application/x-ndjson", "JSON lines"),
    ],
)
def test_accepted_uploads_are_told_apart(filename: str, content_type: str | None, kind: str) -> None:
    assert upload_kind(filename, content_type).name == kind


@pytest.mark.parametrize(
    ("filename", "content_type"),
    [("a.exe", None), ("a.gif", "image/gif"), ("a.gz", None), ("zip", None), ("a.zip", "text/html"), ("a.pt", None)],
)
def test_everything_else_is_unsupported(filename: str, content_type: str | None) -> None:
    with pytest.raises(UnsupportedMedia) as refused:
        upload_kind(filename, content_type)

    assert refused.value.pointer == "/file"


def test_a_modality_that_cannot_come_of_it_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="can only become a dataset of text") as refused:
        upload_kind("a.txt", None, "image")

    assert refused.value.pointer == "/modality"


def test_the_door_needs_neither_numpy_nor_pillow() -> None:
    program = "import sys, shared.media, shared.specs.ingest; print({'numpy', 'PIL', 'torch'} & set(sys.modules))"

    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


def test_ingestion_needs_neither_torch_nor_celery_nor_sql() -> None:
    program = "import sys, worker.jobs.ingest; print({'celery', 'sqlalchemy', 'torch'} & set(sys.modules))"

    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


@pytest.mark.parametrize(
    "wrong", [{"resolution": 3}, {"resolution": 1025}, {"resolution": 8, "modality": "text"}, {"modality": "video"}]
)
def test_an_ingest_spec_that_can_never_work_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        IngestSpec.model_validate({"dataset": DATASET, **wrong})
