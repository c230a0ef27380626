"""Noisemill's own pages: static files that talk to the REST API with the visitor's key.

The content security policy lets them load their own scripts and styles, and images from storage; nothing else.
"""

import html
import mimetypes
from functools import cache
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response

from shared.errors import NotFound
from shared.settings import S3Settings, Settings

router = APIRouter(include_in_schema=False)

FOLDER: Final = Path(__file__).parent.parent / "web"
_PAGE: Final = "index.html"
_TYPES: Final = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@router.get("/")
@router.get("/jobs/{job_id}")
@router.get("/models")
@router.get("/models/{name}")
def get_page(request: Request) -> Response:
    """The list of jobs, one job, the models or one of them: the page itself looks at its address."""
    settings: Settings = request.app.state.settings
    text = _files()[_PAGE].decode().replace("{{flower}}", html.escape(settings.api.flower_url or ""))
    headers = {
        "Content-Security-Policy": policy(settings.s3),
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return Response(text, media_type="text/html", headers=headers)


@router.get("/web/{name}")
def get_file(name: str) -> Response:
    """A script or a style of the pages."""
    content = _files().get(name)
    if content is None or name == _PAGE:
        raise NotFound(f"no such file: {name[:100]}")
    kind = _TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0]
    return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


def policy(s3: S3Settings) -> str:
    """What a browser lets the pages do (CSP level 3)."""
    return "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            f"img-src 'self' {_origin(s3)}",
            *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        ]
    )


def _origin(s3: S3Settings) -> str:
    """Where presigned URLs lead to."""
    endpoint = s3.public_endpoint or s3.endpoint
    if endpoint is None:
        return "https://*.amazonaws.com"
    parts = urlsplit(endpoint)
    # Without path style the bucket is a part of the host's name.
    own = f"{parts.scheme}://{parts.netloc}"
    return own if s3.path_style else f"{own} {parts.scheme}://{s3.bucket}.{parts.netloc}"


@cache
def _files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
