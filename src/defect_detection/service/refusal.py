"""How a call is refused, as the OpenAPI document says it."""

from typing import Any

from pydantic import BaseModel, Field


class Refusal(BaseModel):
    """Why a call was refused, or failed."""

    status: int = Field(description="HTTP status")
    message: str = Field(description="what is wrong, and what to do")


def refusals(*statuses: int) -> dict[str | int, Any]:
    """Return these statuses, and those of all calls, for the document."""
    return dict.fromkeys((400, 401, 403, 429, *statuses), Refusal)
