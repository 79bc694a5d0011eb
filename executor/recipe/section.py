"""What all sections of a recipe have in common: their parent, and the kinds of values that several of them take."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def as_list(value: Any) -> Any:
    """A lone value where a list is wanted is a list of one."""
    return value if isinstance(value, (list, tuple)) or value is None else [value]


NonEmpty = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
# strict=False only lets YAML's lists become tuples: the items are checked as strictly as everything else.
Words = Annotated[tuple[Annotated[str, Field(strict=True)], ...], Field(strict=False), BeforeValidator(as_list)]
Numbers = Annotated[tuple[Annotated[int, Field(strict=True)], ...], Field(strict=False), BeforeValidator(as_list)]
Counts = Annotated[tuple[Positive, ...], Field(strict=False, min_length=1), BeforeValidator(as_list)]
Rates = Annotated[tuple[Annotated[float, Field(gt=0, strict=True)], ...], Field(strict=False), BeforeValidator(as_list)]
PictureSize = Annotated[tuple[Positive, Positive], Field(strict=False)]


class Section(BaseModel):
    """Parent of all sections: unknown keys are errors, values keep their YAML type, nothing changes later."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
