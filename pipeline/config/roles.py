"""What can be said of one role's dropout: a rate alone, or how it is drawn and how it changes."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

Rate = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Variant = Literal["element", "channel", "token", "block"]
Depth = Literal["constant", "linear", "early", "late"]
Progress = Literal["constant", "linear", "curriculum"]


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class RoleDropout(Section):
    """Dropout of one role. A number alone is its rate."""

    rate: Rate | None = None
    """Share of values dropped; left out, the model's own."""
    variant: Variant | None = None
    """What is dropped: single values (`element`, the default), a feature of all tokens (`channel`), whole tokens (`token`), or `block_size` neighbouring features (`block`)."""
    block_size: PositiveInt | None = None
    """Features under one decision, for the variant `block`."""
    depth: Depth = "constant"
    """Over the layers: `linear` rises from 0 at the first to the rate at the last, `early` is live in the first third, `late` in the last third. Sites outside the layers keep the rate."""
    progress: Progress = "constant"
    """Over the steps: `linear` rises from 0 to the rate, `curriculum` is rate * (1 - exp(-gamma * step / max_steps)). Monte-Carlo passes use the rate of the end."""
    gamma: Annotated[float, Field(gt=0)] = 10.0
    """How fast `curriculum` rises."""
    learned: bool = False
    """Learn the rate of each site, from `rate` on (concrete dropout)."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return value if isinstance(value, dict | RoleDropout) else {"rate": value}

    @model_validator(mode="after")
    def _pairs(self) -> "RoleDropout":
        problems = []
        if (self.variant == "block") != (self.block_size is not None):
            problems.append("variant block and block_size go together: give both or neither")
        if self.learned and (self.rate is None or not 0 < self.rate < 1):
            problems.append("a learned rate needs a rate to start from, between 0 and 1")
        if self.learned and (self.depth != "constant" or self.progress != "constant"):
            problems.append("a learned rate follows no schedule: leave depth and progress out")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_serializer(mode="wrap")
    def _to_number(self, handler: SerializerFunctionWrapHandler) -> Any:
        """A rate without anything else is written as the number that it was."""
        is_number = self.rate is not None and self == RoleDropout(rate=self.rate)
        return self.rate if is_number else handler(self)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        mapping = handler.resolve_ref_schema(handler(core_schema))
        rate = {"type": "number", "minimum": 0, "maximum": 1}
        return {"anyOf": [rate, mapping], "description": cls.__doc__}
