"""A canvas that paints soft-edged shapes and keeps their class ids, with numpy alone.

Here and in the modules beside this one, pixels pass only through sums, products, quotients, square
roots, floors and comparisons, which IEEE 754 defines to the bit: what is painted is the same on
every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 96, 96
Color = np.ndarray | Sequence[float]
Point = tuple[float, float]
Window = tuple[slice, slice]
Edges = tuple[float, float, float, float]
"""Left, top, right, bottom."""


class Canvas:
    """A picture and its class ids.

    `color` is (96, 96, 3), float32 in 0..255, `label` is (96, 96), uint8. A shape is painted
    over what is there. Its color is one RGB triple or a texture that broadcasts to the canvas,
    which the shape cuts a piece from; without a label, the class ids below it stay. Coordinates are
    pixels from the top left corner; whatever lies off the canvas is cut away.
    """

    def __init__(self, color: np.ndarray, label: int) -> None:
        self.color = np.broadcast_to(color, (HEIGHT, WIDTH, 3)).astype(np.float32)
        self.label = np.full((HEIGHT, WIDTH), label, dtype=np.uint8)

    def box(
        self, edges: Edges, color: Color, label: int | None = None, radius: float = 0.0
    ) -> None:
        """Paint a rectangle whose corners are rounded by `radius`."""
        (left, top, right, bottom), (window, x, y) = edges, _window(edges)
        across = np.abs(x - (left + right) / 2) - (right - left) / 2 + radius
        down = np.abs(y - (top + bottom) / 2) - (bottom - top) / 2 + radius
        corner_x, corner_y = np.maximum(across, 0), np.maximum(down, 0)
        outside = np.sqrt(corner_x * corner_x + corner_y * corner_y)
        inside = np.minimum(np.maximum(across, down), 0)
        self._paint(window, outside + inside - radius, color, label, 1.0)

    def fill(self, edges: Edges, color: Color, label: int | None = None) -> None:
        """Paint a rectangle of whole pixels, whose texture has its size, not the canvas'."""
        left, top, right, bottom = (int(edge) for edge in edges)
        inside = (slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0)))
        paint = np.asarray(color, dtype=np.float32)
        if paint.ndim == 3:
            paint = paint[max(-top, 0) : HEIGHT - top, max(-left, 0) : WIDTH - left]
        self.color[inside] = paint
        if label is not None:
            self.label[inside] = label

    def ellipse(
        self,
        center: Point,
        radii: Point,
        color: Color,
        label: int | None = None,
        opacity: float = 1.0,
    ) -> None:
        """Paint an ellipse with axes along x and y."""
        (x_center, y_center), (x_radius, y_radius) = center, radii
        edges = x_center - x_radius, y_center - y_radius, x_center + x_radius, y_center + y_radius
        window, x, y = _window(edges)
        across, down = (x - x_center) / x_radius, (y - y_center) / y_radius
        radius = np.sqrt(across * across + down * down)
        self._paint(window, (radius - 1) * min(x_radius, y_radius), color, label, opacity)

    def polygon(self, points: Sequence[Point], color: Color, label: int | None = None) -> None:
        """Paint a convex polygon; its corners may run either way round."""
        corners = np.array(points, dtype=np.float64)
        window, x, y = _window((*corners.min(axis=0), *corners.max(axis=0)))
        edges = np.roll(corners, -1, axis=0) - corners
        turn = edges[0, 0] * edges[1, 1] - edges[0, 1] * edges[1, 0]
        distance = np.full((y.size, x.size), -np.inf)
        for (x0, y0), (along_x, along_y) in zip(corners, edges, strict=True):
            length = np.sqrt(along_x * along_x + along_y * along_y) * (1 if turn > 0 else -1)
            distance = np.maximum(distance, (along_y * (x - x0) - along_x * (y - y0)) / length)
        self._paint(window, distance, color, label, 1.0)

    def _paint(
        self, window: Window, distance: np.ndarray, color: Color, label: int | None, opacity: float
    ) -> None:
        paint = np.broadcast_to(np.asarray(color, dtype=np.float32), self.color.shape)[window]
        weight = np.minimum(np.maximum(0.5 - distance, 0), 1)[..., None] * opacity
        below = self.color[window]
        below += (paint - below) * weight
        if label is not None:
            self.label[window][distance < 0] = label


def _window(edges: Edges) -> tuple[Window, np.ndarray, np.ndarray]:
    """The pixels around a shape: slices, and the coordinates of centers, (1, w) and (h, 1)."""
    left, top, right, bottom = edges
    x0, x1 = (int(min(max(edge, 0), WIDTH)) for edge in (left - 1, right + 2))
    y0, y1 = (int(min(max(edge, 0), HEIGHT)) for edge in (top - 1, bottom + 2))
    x, y = np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5
    return (slice(y0, y1), slice(x0, x1)), x[None, :], y[:, None]
