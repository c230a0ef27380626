"""What S3 answers to a request: checked as AWS checks it, refused in its words.

What is not implemented is refused (501), so that nothing passes by being ignored. Signatures are not computed; the
access key must be ours.
"""

import binascii
import re
import struct
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import format_datetime
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.chaos.objects import About, Bucket, Condition, Description, Refused, digest_of

_XMLNS = "http://s3.amazonaws.com/doc/2006-03-01/"
_RANGE = re.compile(r"bytes=(\d*)-(\d*)$")
_MOST_KEYS = 1000
_CHECKSUM, _META = "x-amz-checksum-", "x-amz-meta-"
_CHECKSUMS: Mapping[str, Callable[[bytes], str]] = {
    "crc32": lambda body: b64encode(struct.pack(">I", zlib.crc32(body))).decode(),
    "sha1": lambda body: digest_of("sha1", body),
    "sha256": lambda body: digest_of("sha256", body),
}
_NOT_IMPLEMENTED = Refused(
    501, "NotImplemented", "A header or parameter implies functionality that is not implemented."
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An HTTP response."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""


class Request:
    """One request, taken apart, checked and answered."""

    def __init__(self, method: str, path: str, headers: Mapping[str, str], read_body: Callable[[], bytes]) -> None:
        self.method, self.headers = method, {name.lower(): value for name, value in headers.items()}
        self._read_body = read_body
        url = urlsplit(path)
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        self.bucket, self.key = bucket, key
        self.body = b""

    def answer(self, objects: Bucket, *, bucket: str, access_key: str) -> Answer:
        """Do it, and say what came of it; raises ``Refused``."""
        self.objects = objects
        self._refuse_strangers(access_key)
        self._refuse_the_unknown()
        self.body = self._checked_body()
        if self.bucket != bucket:
            raise Refused(404, "NoSuchBucket", "The specified bucket does not exist.")
        return self._of_object() if self.key else self._of_bucket()

    # What every request must be

    def _refuse_strangers(self, access_key: str) -> None:
        signed = self.headers.get("authorization", "")
        credential = self.query.get("X-Amz-Credential", signed.partition("Credential=")[2])
        if credential.partition("/")[0] != access_key:
            raise Refused(403, "AccessDenied", "Access Denied.")
        if signed and "x-amz-content-sha256" not in self.headers:
            raise Refused(400, "InvalidRequest", "Missing required header for this request: x-amz-content-sha256")

    def _refuse_the_unknown(self) -> None:
        streamed = self.headers.get("x-amz-content-sha256", "").startswith("STREAMING-")
        if streamed or self.headers.keys() & {"x-amz-copy-source", "transfer-encoding", "x-amz-trailer"}:
            raise _NOT_IMPLEMENTED
        if self.method == "PUT" and "content-length" not in self.headers:
            raise Refused(411, "MissingContentLength", "You must provide the Content-Length HTTP header.")

    def _checked_body(self) -> bytes:
        body = self._read_body()
        claimed = self.headers.get("x-amz-content-sha256", "UNSIGNED-PAYLOAD")
        if claimed not in ("UNSIGNED-PAYLOAD", b64decode(digest_of("sha256", body)).hex()):
            raise Refused(400, "XAmzContentSHA256Mismatch", "The provided x-amz-content-sha256 does not match.")
        if (md5 := self.headers.get("content-md5")) is not None and md5 != digest_of("md5", body):
            is_digest = len(_decoded(md5)) == 16
            raise Refused(400, "BadDigest" if is_digest else "InvalidDigest", "The Content-MD5 did not match.")
        for algorithm, value in self._checksums().items():
            if algorithm not in _CHECKSUMS:
                raise _NOT_IMPLEMENTED
            if value != _CHECKSUMS[algorithm](body):
                raise Refused(400, "BadDigest", f"The {algorithm} you specified did not match what we received.")
        return body

    def _checksums(self) -> dict[str, str]:
        named = {n.removeprefix(_CHECKSUM): v for n, v in self.headers.items() if n.startswith(_CHECKSUM)}
        return {name: value for name, value in named.items() if name not in ("mode", "type", "algorithm")}

    # The bucket

    def _of_bucket(self) -> Answer:
        match self.method, self.query:
            case "HEAD" | "PUT", _:
                return Answer()
            case "GET", {"list-type": "2"}:
                return self._list()
            case "GET", {"uploads": _}:
                found = "".join(
                    f"<Upload><Key>{escape(k)}</Key><UploadId>{u}</UploadId></Upload>"
                    for k, u in self.objects.uploads()
                )
                return _xml("ListMultipartUploadsResult", f"<IsTruncated>false</IsTruncated>{found}")
            case "POST", {"delete": _}:
                return self._delete_many()
        raise _NOT_IMPLEMENTED

    def _list(self) -> Answer:
        if "delimiter" in self.query:
            raise _NOT_IMPLEMENTED
        prefix = self.query.get("prefix", "")
        after = self.query.get("continuation-token") or self.query.get("start-after", "")
        limit = min(int(self.query.get("max-keys", _MOST_KEYS)), _MOST_KEYS)
        found = [one for one in self.objects.all() if one.key.startswith(prefix) and one.key.encode() > after.encode()]
        page = found[:limit]
        spell = quote if self.query.get("encoding-type") == "url" else escape
        rows = "".join(
            f"<Contents><Key>{spell(one.key)}</Key><LastModified>{one.modified}</LastModified>"
            f"<ETag>{escape(one.etag)}</ETag><Size>{one.size}</Size></Contents>"
            for one in page
        )
        more = len(found) > len(page)
        token = f"<NextContinuationToken>{escape(page[-1].key)}</NextContinuationToken>" if more and page else ""
        encoding = "<EncodingType>url</EncodingType>" if spell is quote else ""
        about = f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(page)}</KeyCount>{encoding}{token}"
        return _xml("ListBucketResult", about + rows)

    def _delete_many(self) -> Answer:
        if "content-md5" not in self.headers and not self._checksums():
            raise Refused(400, "InvalidRequest", "Missing required header for this request: Content-MD5")
        keys = [element.text or "" for element in _parsed(self.body).iter(f"{{{_XMLNS}}}Key")]
        if not 0 < len(keys) <= _MOST_KEYS:
            raise Refused(400, "MalformedXML", "The XML you provided was not well-formed or did not validate.")
        for key in keys:
            self.objects.delete(key)
        return _xml("DeleteResult", "")

    # Objects

    def _of_object(self) -> Answer:
        if self.query.keys() & {"uploads", "uploadId"}:
            return self._of_upload()
        match self.method:
            case "GET" | "HEAD":
                return self._get()
            case "PUT":
                return self._put()
            case "DELETE":
                self.objects.delete(self.key)
                return Answer(status=204)
        raise _NOT_IMPLEMENTED

    def _of_upload(self) -> Answer:
        match self.method, self.query:
            case "GET", {"uploadId": upload}:
                return self._parts(upload)
            case "PUT", {"uploadId": upload, "partNumber": number}:
                return Answer(headers={"ETag": f'"{self.objects.put_part(self.key, upload, int(number), self.body)}"'})
            case "POST", {"uploads": _}:
                upload = self.objects.begin(self.key, self._about())
                return _xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
            case "POST", {"uploadId": upload}:
                return self._complete(upload)
            case "DELETE", {"uploadId": upload}:
                self.objects.abort(self.key, upload)
                return Answer(status=204)
        raise _NOT_IMPLEMENTED

    def _parts(self, upload: str) -> Answer:
        rows = "".join(
            f"<Part><PartNumber>{part.number}</PartNumber><ETag>&quot;{part.etag}&quot;</ETag></Part>"
            for part in self.objects.parts(self.key, upload)
        )
        return _xml("ListPartsResult", f"<IsTruncated>false</IsTruncated>{rows}")

    def _put(self) -> Answer:
        stored = self.objects.put(self.key, self.body, self._about())
        return Answer(headers={"ETag": stored.etag, **_checksum_headers(stored)})

    def _complete(self, upload: str) -> Answer:
        listed = [
            (
                int(part.findtext(f"{{{_XMLNS}}}PartNumber", "0")),
                part.findtext(f"{{{_XMLNS}}}ETag", "").strip('"'),
            )
            for part in _parsed(self.body).iter(f"{{{_XMLNS}}}Part")
        ]
        made = self.objects.complete(self.key, upload, listed, self._condition())
        return _xml("CompleteMultipartUploadResult", f"<Key>{escape(self.key)}</Key><ETag>{escape(made.etag)}</ETag>")

    def _get(self) -> Answer:
        about, body = self.objects.read(self.key)
        if self.headers.get("if-match", about.etag) not in ("*", about.etag):
            raise Refused(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")
        headers = {
            "ETag": about.etag, "Accept-Ranges": "bytes", "Content-Type": about.media_type,
            "Last-Modified": format_datetime(datetime.fromisoformat(about.modified), usegmt=True),
            **{f"{_META}{name}": value for name, value in about.metadata.items()},
        }  # fmt: skip
        if "response-content-disposition" in self.query:
            headers["Content-Disposition"] = self.query["response-content-disposition"]
        headers["Content-Type"] = self.query.get("response-content-type", headers["Content-Type"])
        if self.headers.get("if-none-match") in ("*", about.etag):
            return Answer(status=304, headers=headers)
        return self._ranged(about, body, headers)

    def _ranged(self, about: Description, body: bytes, headers: dict[str, str]) -> Answer:
        asked = _RANGE.match(self.headers.get("range", ""))
        if asked is None or asked.group() == "bytes=-":  # a range that cannot be read is ignored (RFC 9110)
            if self.headers.get("x-amz-checksum-mode") == "ENABLED":
                headers |= _checksum_headers(about)
            length = {"Content-Length": str(about.size)} if self.method == "HEAD" else {}
            return Answer(headers=headers | length, body=body)
        first, last = asked.groups()
        start = int(first) if first else max(0, about.size - int(last))
        stop = min(int(last) + 1, about.size) if first and last else about.size
        if start >= stop:
            raise Refused(416, "InvalidRange", "The requested range is not satisfiable.")
        return Answer(
            status=206,
            headers=headers | {"Content-Range": f"bytes {start}-{stop - 1}/{about.size}"},
            body=body[start:stop],
        )

    def _about(self) -> About:
        metadata = {n.removeprefix(_META): value for n, value in self.headers.items() if n.startswith(_META)}
        return About(
            media_type=self.headers.get("content-type", "binary/octet-stream"),
            metadata=metadata,
            checksums=self._checksums(),
            only_if=self._condition(),
        )

    def _condition(self) -> Condition | None:
        none_match, match = self.headers.get("if-none-match"), self.headers.get("if-match")
        return None if none_match is match is None else Condition(none_match, match)


def _checksum_headers(about: Description) -> dict[str, str]:
    return {f"{_CHECKSUM}{name}": value for name, value in about.checksums.items()}


def failure(*, slow_down: bool) -> Refused:
    if slow_down:
        return Refused(503, "SlowDown", "Please reduce your request rate.")
    return Refused(500, "InternalError", "We encountered an internal error. Please try again.")


def error_answer(refused: Refused) -> Answer:
    body = f"<Error><Code>{refused.code}</Code><Message>{escape(refused.message)}</Message></Error>"
    return Answer(status=refused.status, headers={"Content-Type": "application/xml"}, body=body.encode())


def _xml(name: str, content: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<{name} xmlns="{_XMLNS}">{content}</{name}>'
    return Answer(headers={"Content-Type": "application/xml"}, body=body.encode())


def _parsed(body: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(body)
    except ElementTree.ParseError:
        raise Refused(400, "MalformedXML", "The XML you provided was not well-formed.") from None


def _decoded(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
