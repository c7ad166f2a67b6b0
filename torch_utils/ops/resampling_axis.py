"""Know how upsampling, filtering and downsampling change the size of one image axis, and what their transpose is.

With x spread by `up`, padded by `front` and filtered with k taps, output j is

    y[j] = sum_i x[i] * f[down * j + k - 1 - front - up * i].

Read with i and j exchanged, the same formula is the derivative: up and down change places, the filter is flipped, and
the front padding becomes k - 1 - front.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Resampling along one image axis."""

    up: int
    down: int
    front: int  # zeros before the first spread sample; negative crops
    back: int

    def output_size(self, size: int, taps: int) -> int:
        return (size * self.up + self.front + self.back - taps) // self.down + 1

    def transposed(self, size: int, taps: int) -> "Axis":
        """Return the axis of the derivative with respect to an input of `size` samples."""
        front = taps - 1 - self.front
        covered = self.output_size(size, taps) * self.down
        return Axis(up=self.down, down=self.up, front=front, back=(size - 1) * self.up + taps - covered - front)
