"""How many pixels of a picture or a frame a model is shown."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field, model_validator

from api_stub.contract.wire import WholeNumber, WireModel

#: 16 384 × 16 384: more than any processor makes of a picture.
MAX_PIXELS: Final = 2**28

PixelCount = Annotated[WholeNumber, Field(ge=1, le=MAX_PIXELS)]


class MediaOptions(WireModel):
    """Limits for every picture and frame of a job, after resizing; the processor rounds to whole patches or tiles.

    A model whose processor takes no such limit refuses the job.
    """

    min_pixels: PixelCount | None = None
    max_pixels: PixelCount | None = None

    @model_validator(mode="after")
    def _ordered(self) -> MediaOptions:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels: {self.min_pixels} is above max_pixels, {self.max_pixels}")
        return self

    @property
    def are_empty(self) -> bool:
        """Whether nothing is asked."""
        return self.min_pixels is None and self.max_pixels is None
