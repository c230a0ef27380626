"""Fields are told about by the strings below them."""

from pydantic import BaseModel, Field

from shared.described import Described, descriptions


class Parcel(Described):
    """What is sent."""

    weight: float
    """In kilograms,
    with its wrapping."""
    to: str = Field(alias="address")
    """Where it goes."""
    note: str = Field(default="", description="Read by nobody.")
    """Not shown: the field says something else."""
    silent: int = 0


class Letter(Parcel):
    """A light one."""

    weight: float = 0.02


class Post(BaseModel):
    """Holds what is described and says nothing itself."""

    parcel: Parcel
    """Only strings of what is ``Described`` are read."""


def told(schema: dict[str, dict[str, dict[str, str]]]) -> dict[str, str]:
    return {name: field["description"] for name, field in schema["properties"].items() if "description" in field}


def test_the_schema_says_what_the_strings_say() -> None:
    says = {"weight": "In kilograms,\nwith its wrapping.", "address": "Where it goes.", "note": "Read by nobody."}

    assert told(Parcel.model_json_schema()) == says
    assert told(Post.model_json_schema()["$defs"]["Parcel"]) == says
    assert told(Post.model_json_schema()) == {}


def test_a_field_that_is_declared_again_has_its_own_string_or_none() -> None:
    assert "weight" not in descriptions(Letter)
    assert descriptions(Letter)["to"] == "Where it goes."


def test_a_class_within_a_function_is_described() -> None:
    class Inner(Described):
        depth: int
        """How far in."""

    assert told(Inner.model_json_schema()) == {"depth": "How far in."}


def test_a_class_without_source_is_not_described() -> None:
    made: dict[str, type[Described]] = {}
    code = "class Made(Described):\n    size: int\n    'In metres.'\n"
    exec(code, {"Described": Described, "__name__": "nowhere"}, made)

    assert told(made["Made"].model_json_schema()) == {}
