"""Where in a body an error is: pydantic's locations, made into JSON Pointers (RFC 6901) to what the client sent."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic_core import ErrorDetails

from shared.wire import FieldError

DISCRIMINATORS: Final = ("type", "family", "task")
"""Fields that choose a member of a union; pydantic puts their values into locations, where they are no keys."""

_TAG_ERRORS: Final = frozenset({"union_tag_invalid", "union_tag_not_found"})
_KEY_LAST: Final = frozenset({"missing", "extra_forbidden"})
_MARKERS: Final = frozenset({"[key]"})


def pointer(path: Sequence[str | int]) -> str:
    """The JSON Pointer of a path of keys and indexes."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def field_error(error: ErrorDetails, body: Any) -> FieldError:
    """One of pydantic's errors about ``body``, with the pointer to the field that is wrong."""
    path = _path(error, body)
    context = error.get("ctx", {})
    if error["type"] in _TAG_ERRORS:
        path.append(str(context["discriminator"]).strip("'"))
    elif isinstance(context.get("field"), str):
        path.append(context["field"])
    return FieldError(pointer=pointer(path), detail=_detail(error))


def _detail(error: ErrorDetails) -> str:
    if error["type"] == "union_tag_invalid":
        return f"must be one of {error.get('ctx', {}).get('expected_tags')}"
    if error["type"] == "union_tag_not_found":
        return "Field required"
    if error["type"] == "extra_forbidden":
        return "there is no such field"
    return error["msg"]


def _path(error: ErrorDetails, body: Any) -> list[str | int]:
    """The location without what is not in the body: discriminator values, and marks such as ``[key]``."""
    path: list[str | int] = []
    node, untagged = body, True
    for place, part in enumerate(error["loc"]):
        is_last = place == len(error["loc"]) - 1
        names_a_key = is_last and error["type"] in _KEY_LAST
        if part in _MARKERS and is_last:
            continue
        if untagged and not names_a_key and _is_tag(part, node):
            untagged = False
            continue
        path.append(part)
        node, untagged = _child(node, part), True
    return path


def _is_tag(part: str | int, node: Any) -> bool:
    return isinstance(node, Mapping) and any(node.get(name) == part for name in DISCRIMINATORS)


def _child(node: Any, part: str | int) -> Any:
    try:
        return node[part]
    except (LookupError, TypeError):
        return None
