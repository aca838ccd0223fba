"""Photographs of an archive, whose bytes are kept as they are."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tokenfusion.errors import UserError


class Photo(NamedTuple):
    """A jpg's bytes and what they show, uint8 [H, W, 3]."""

    data: bytes
    pixels: np.ndarray


def read_photo(path: Path, advice: str) -> Photo:
    """Read a jpg and decode it once, to see that it is whole.

    Errors: UserError with ``advice`` (where the file comes from) where it is missing, damaged or no colour jpg.
    """
    try:
        data = path.read_bytes()
        with Image.open(path) as image:
            image.load()
            if image.format != "JPEG" or image.mode != "RGB":
                raise UserError(f"{path}: is {image.format} {image.mode}, wanted JPEG RGB; {advice}")
            return Photo(data, np.asarray(image))
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); {advice}") from None
