"""How a convolution's kernel moves over an image: one value wherever Python handles the three together."""

from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """Stride, padding and dilation of a convolution, each a list (height, width); unpacks as torch's arguments."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def output_size(self, image: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Height and width of the output for those of an image and a kernel."""
        return [
            (image[i] + 2 * self.padding[i] - self.dilation[i] * (kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in range(2)
        ]

    def is_linear(self, kernel: Sequence[int]) -> bool:
        """A 1 x 1 convolution that touches every pixel once is a linear layer on the pixels."""
        return [*kernel] == [1, 1] and [*self.stride] == [1, 1] and [*self.padding] == [0, 0]
