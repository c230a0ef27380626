"""The peer of ``bench/control_plane.py``: a service of FastAPI, Celery's ``delay()`` and ``AsyncResult``.

As the first page of either manual has it: what is queued lives in the broker, what was done in the result backend.
"""

import os
from typing import Any

from celery import Celery
from celery.result import AsyncResult
from fastapi import FastAPI
from pydantic import BaseModel

URL = os.environ["CELERY_SERVICE_URL"]

celery: Any = Celery("celery_service", broker=URL, backend=URL)
app = FastAPI()


class Generate(BaseModel):
    """What is to be generated."""

    model: str
    num_samples: int = 1
    seed: int = 0


@celery.task
def generate(request: dict[str, Any]) -> dict[str, Any]:
    return {"num_samples": request["num_samples"]}


@app.post("/jobs", status_code=202)
def submit(request: Generate) -> dict[str, str]:
    return {"id": generate.delay(request.model_dump()).id}


@app.get("/jobs/{job_id}")
def show(job_id: str) -> dict[str, Any]:
    job = AsyncResult(job_id, app=celery)
    return {"id": job_id, "state": job.state, "result": job.result if job.ready() else None}
