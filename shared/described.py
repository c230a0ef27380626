"""Models whose fields are told about by the strings below them, read when somebody asks.

pydantic's own way (``use_attribute_docstrings``) looks for a class's source as the class comes to be: a fifth of the
time that importing the API took, for what only documents need.
"""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Described(BaseModel):
    """Its JSON schema has each field's string as the field's description, if the field has no other."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties: dict[str, Any] = handler.resolve_ref_schema(schema).get("properties", {})
        names = {field.alias or name: name for name, field in cls.model_fields.items()}
        told = descriptions(cls)
        for shown, one in properties.items():
            if (name := names.get(shown)) in told:
                one.setdefault("description", told[name])
        return schema


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """What is said about each field, by its name, where the field was last declared; nothing without the source."""
    found: dict[str, str] = {}
    for name in model.model_fields:
        declared = next((one for one in model.__mro__ if name in inspect.get_annotations(one)), None)
        if declared and (told := _of_module(declared.__module__).get(declared.__qualname__, {}).get(name)):
            found[name] = told
    return found


@cache
def _of_module(name: str) -> Mapping[str, Mapping[str, str]]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[name]))
    except (KeyError, OSError, TypeError):  # made without a file, or its source was left out of the installation
        return {}
    return {qualname: dict(_strings(body)) for qualname, body in _classes(tree.body)}


def _classes(body: list[ast.stmt], within: str = "") -> Iterator[tuple[str, list[ast.stmt]]]:
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            yield within + statement.name, statement.body
            yield from _classes(statement.body, f"{within}{statement.name}.")
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _classes(statement.body, f"{within}{statement.name}.<locals>.")


def _strings(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for declared, told in pairwise(body):
        match declared, told:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, inspect.cleandoc(text)
            case _:
                pass
