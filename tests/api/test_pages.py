"""Noisemill's own pages: whole, self-contained, and under a strict content security policy."""

import re

import httpx
import pytest

from api.routes import pages
from shared.settings import S3Settings, Settings
from tests.api.support import make_settings, serving


def test_every_page_comes_with_all_its_parts(stranger: httpx.Client) -> None:
    for path in ("/", "/jobs/job_0123", "/models", "/models/digits"):
        page = stranger.get(path)
        assert page.headers["Content-Type"].startswith("text/html")
        parts = re.findall(r'(?:src|href)="(/web/[^"]+)"', page.text)
        assert len(parts) >= 3
        for part in parts:
            assert stranger.get(part).is_success, part


def test_scripts_import_only_what_is_there(stranger: httpx.Client) -> None:
    for script in pages.FOLDER.glob("*.js"):
        served = stranger.get(f"/web/{script.name}")
        assert served.headers["Content-Type"].startswith("text/javascript")
        assert all((pages.FOLDER / name).exists() for name in re.findall(r'from "\./([^"]+)"', served.text))


def test_nothing_is_loaded_from_elsewhere_or_written_as_html(stranger: httpx.Client) -> None:
    for file in pages.FOLDER.iterdir():
        text = re.sub(r"http://www\.w3\.org/\S+", "", file.read_text())
        assert "innerHTML" not in text and "eval(" not in text, file
        assert not re.search(r"(src|href|url|import|fetch)\W{1,3}(https?:)?//", text), file
    assert not re.search(r"<script>|\sstyle=|\son\w+=", stranger.get("/").text)


def test_the_policy_allows_images_from_storage_and_little_else(stranger: httpx.Client, settings: Settings) -> None:
    policy = stranger.get("/").headers["Content-Security-Policy"]

    assert f"img-src 'self' {settings.s3.endpoint};" in policy
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "unsafe" not in policy and "*" not in policy


@pytest.mark.parametrize(
    ("where", "origin"),
    [
        ({}, "https://*.amazonaws.com"),
        ({"endpoint": "http://s3:9000/x"}, "http://s3:9000"),
        ({"endpoint": "http://s3:9000", "public_endpoint": "https://files.example.org"}, "https://files.example.org"),
        ({"endpoint": "https://s3.org", "path_style": False, "bucket": "b"}, "https://s3.org https://b.s3.org"),
    ],
)
def test_the_policy_follows_where_storage_is(where: dict[str, str], origin: str) -> None:
    s3 = S3Settings.model_validate({"access_key": "a", "secret_key": "b", **where})

    assert f"img-src 'self' {origin};" in pages.policy(s3)


@pytest.mark.parametrize("path", ["/web/nothing.js", "/web/index.html", "/web/..%2fapp.py", "/web/%2e%2e/app.py"])
def test_other_files_are_not_served(stranger: httpx.Client, path: str) -> None:
    answer = stranger.get(path)

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_the_address_of_flower_is_written_safely(module_database: str, valkey: str, module_s3: object) -> None:
    settings = make_settings(module_database, valkey, module_s3, flower_url='http://f:5555/"><script>')

    with serving(settings) as url:
        text = httpx.get(url).text

    assert 'content="http://f:5555/&quot;&gt;&lt;script&gt;"' in text
