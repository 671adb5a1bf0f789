"""Images inside an HTML page."""

import base64
import io

import numpy as np
from PIL import Image

LOSSLESS_SIDE = 640  # images up to this side are stored as PNG, larger ones as JPEG


def data_uri(image: np.ndarray, *, longer_side: int, kind: str | None = None) -> str:
    """A ``data:`` URI of an image.

    Args:
        image: (H, W, 3) uint8, RGB.
        longer_side: Larger images are reduced to this longer side, pixels.
        kind: ``'PNG'`` or ``'JPEG'``; None: PNG up to a longer side of 640 pixels.
    """
    embedded, file = Image.fromarray(image), io.BytesIO()
    kind = kind or ('PNG' if max(image.shape[:2]) <= LOSSLESS_SIDE else 'JPEG')
    embedded.thumbnail((longer_side, longer_side))
    embedded.save(file, kind, quality=90)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}'
