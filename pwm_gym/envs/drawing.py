"""Simple pictures from NumPy alone: thick lines and discs with soft edges."""

from __future__ import annotations

import numpy as np

__all__ = ["Canvas"]

_COLORS = {
    "ground": (150, 150, 150),
    "body": (70, 100, 160),
    "rod": (205, 120, 50),
    "joint": (40, 40, 40),
}


class Canvas:
    """A white square that shows x and y in [-1, 1], y upwards.

    Args:
        size: Width and height in pixels.

    Example:
        >>> canvas = Canvas(64)
        >>> canvas.line((-0.5, 0.0), (0.5, 0.0), 0.1, "rod")
        >>> canvas.disc((0.0, 0.5), 0.2, "joint")
        >>> canvas.pixels()[32, 32].tolist(), canvas.pixels()[2, 2].tolist()
        ([205, 120, 50], [255, 255, 255])
    """

    def __init__(self, size: int) -> None:
        centres = (np.arange(size) + 0.5) * (2.0 / size) - 1.0
        self._x, self._y = np.meshgrid(centres, -centres)  # (size, size)
        self._edge = 2.0 / size  # a pixel
        self._image = np.full((size, size, 3), 255.0)

    def line(self, start: tuple[float, ...], end: tuple[float, ...], radius: float, color: str) -> None:
        """Draw a line with round ends, `radius` to either side."""
        (x0, y0), (x1, y1) = start, end
        dx, dy = x1 - x0, y1 - y0
        squared = dx * dx + dy * dy
        along = 0.0 if squared == 0.0 else np.clip(((self._x - x0) * dx + (self._y - y0) * dy) / squared, 0.0, 1.0)
        distance = np.hypot(self._x - x0 - along * dx, self._y - y0 - along * dy)
        cover = np.clip((radius - distance) / self._edge + 0.5, 0.0, 1.0)[..., None]  # (size, size, 1)
        self._image += cover * (np.array(_COLORS[color]) - self._image)

    def disc(self, centre: tuple[float, ...], radius: float, color: str) -> None:
        """Draw a disc."""
        self.line(centre, centre, radius, color)

    def pixels(self) -> np.ndarray:
        """Give the picture, (size, size, 3), uint8."""
        return self._image.round().astype(np.uint8)
