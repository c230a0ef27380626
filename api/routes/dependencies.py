"""What routes ask for: the parts of the process, who calls, and links; and what several of them say."""

from typing import Annotated, Final

from fastapi import Depends, Header, Security

from api.auth import Caller, authenticate
from api.paging import Paging
from api.parts import Parts
from api.views import Links

TheParts = Annotated[Parts, Depends(Parts.of)]
TheLinks = Annotated[Links, Depends(Links.of)]
ThePaging = Annotated[Paging, Depends()]

AnyCaller = Annotated[Caller, Security(authenticate)]
JobReader = Annotated[Caller, Security(authenticate, scopes=["jobs:read"])]
JobWriter = Annotated[Caller, Security(authenticate, scopes=["jobs:write"])]
DatasetReader = Annotated[Caller, Security(authenticate, scopes=["datasets:read"])]
DatasetWriter = Annotated[Caller, Security(authenticate, scopes=["datasets:write"])]
ModelReader = Annotated[Caller, Security(authenticate, scopes=["models:read"])]
ModelWriter = Annotated[Caller, Security(authenticate, scopes=["models:write"])]

IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$"),
]

POLL_SECONDS: Final = "1"
"""``Retry-After`` of a job that has not ended."""
