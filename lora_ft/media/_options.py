"""What the options of augmentation share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]


class Augment(BaseModel):
    """Nothing is on unless it is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def on(self) -> bool:
        """Whether anything is asked for."""
        return self != type(self)()
