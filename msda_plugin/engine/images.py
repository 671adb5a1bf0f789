"""Reads image files, without MMDetection."""

import os
from pathlib import Path

import cv2
import numpy as np


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8, RGB, rotated according to its EXIF data.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read as an image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'the image {path} does not exist; give the path of an image file')
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # the file is empty, or has too many pixels
        image = None
    if image is None:
        raise ValueError(f'{path} cannot be read as an image; give a JPEG or PNG file')
    return np.ascontiguousarray(image[..., ::-1])
