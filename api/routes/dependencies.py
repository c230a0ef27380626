"""What routes ask for: the parts of the process, who calls, and links."""

from typing import Annotated

from fastapi import Depends, Security

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
