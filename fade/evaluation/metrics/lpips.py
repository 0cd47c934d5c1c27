"""LPIPS (Zhang et al., arXiv 1801.03924): how different people find two pictures of the same prompt and seed.

Of AlexNet or VGG-16, features after five ReLUs, of unit length over channels; the squared difference, weighed by what
was learned from people's judgements, is averaged over places and summed over layers. The weights come with neither this
package nor its requirements. Who has the published package writes them down once:

    model = lpips.LPIPS(net="alex")  # or net="vgg"
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, "lpips-alex.safetensors")

Without them there is the LPIPS-like distance (`fade.evaluation.metrics.perceptual`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from fade.errors import FadeError
from fade.evaluation.metrics.metric import Drawn, Metric, mean_of
from fade.files import WRITE_ERRORS

_AT_ONCE = 8
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of pixels in [-1, 1], as the authors have them."""


@dataclass(frozen=True)
class Network:
    """A backbone's convolutions, each followed by a ReLU, with torchvision's numbers.

    `slices` has for each of the five parts (number, output channels, kernel) of its convolutions; `pooled` are the
    parts that begin with a maximum over `pool` × `pool` places, two apart; `first` is stride and padding of the first
    convolution, the others keep the size. `smallest` is the side of the smallest picture that it takes.
    """

    name: str
    slices: tuple[tuple[tuple[int, int, int], ...], ...]
    pooled: tuple[int, ...]
    pool: int
    first: tuple[int, int]
    smallest: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that is read from a file, by its key there."""
        found, channels = {}, 3
        for part, convolutions in enumerate(self.slices):
            for number, width, kernel in convolutions:
                key = f"net.slice{part + 1}.{number}"
                found[f"{key}.weight"], found[f"{key}.bias"] = (width, channels, kernel, kernel), (width,)
                channels = width
            found[f"lin{part}.model.1.weight"] = (1, channels, 1, 1)
        return found

    def features(self, x: Tensor, tensors: dict[str, Tensor]) -> list[Tensor]:
        """After each part: [n, 3, H, W] -> [n, C, h, w] each."""
        found: list[Tensor] = []
        for part, convolutions in enumerate(self.slices):
            if part in self.pooled:
                x = F.max_pool2d(x, self.pool, 2)
            for number, _, kernel in convolutions:
                key = f"net.slice{part + 1}.{number}"
                stride, padding = self.first if number == 0 else (1, kernel // 2)
                x = F.conv2d(x, tensors[f"{key}.weight"], tensors[f"{key}.bias"], stride, padding).relu()
            found.append(x)
        return found


ALEXNET = Network(
    "AlexNet", (((0, 64, 11),), ((3, 192, 5),), ((6, 384, 3),), ((8, 256, 3),), ((10, 256, 3),)),
    pooled=(1, 2), pool=3, first=(4, 2), smallest=31,
)  # fmt: skip
VGG16 = Network(
    "VGG-16",
    tuple(
        tuple((number, width, 3) for number in numbers)
        for width, *numbers in ((64, 0, 2), (128, 5, 7), (256, 10, 12, 14), (512, 17, 19, 21), (512, 24, 26, 28))
    ),
    pooled=(1, 2, 3, 4), pool=2, first=(1, 1), smallest=16,
)  # fmt: skip


class Lpips:
    """LPIPS with the weights in a safetensors file, or in the one such file of a folder; `name` says which network.

    Read are `net.slice1.0.weight` and `.bias` up to `net.slice5.10.…` (AlexNet) or `net.slice5.28.…` (VGG-16) and the
    heads `lin0.model.1.weight` to `lin4.model.1.weight`; others (`lins.…`, `scaling_layer.…`) are left. Raises
    FadeError for a file that cannot be read, is without them, or has others of their names.
    """

    def __init__(self, source: str | Path, device: str | torch.device = "cpu") -> None:
        path = Path(source)
        if path.is_dir():
            files = sorted(path.glob("*.safetensors"))
            if len(files) != 1:
                raise FadeError(f"there are {len(files)} safetensors files in {str(path)!r}; name the one with LPIPS")
            path = files[0]
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except WRITE_ERRORS as error:
            reason = str(error).strip().splitlines()[0]
            raise FadeError(f"cannot read the weights of LPIPS from {str(path)!r}: {reason}") from error
        self._network = VGG16 if "net.slice1.2.weight" in tensors else ALEXNET
        for key, shape in self._network.shapes().items():
            there = tuple(tensors[key].shape) if key in tensors else None
            if there != shape:
                told = "is missing" if there is None else f"has the shape {list(there)} and not {list(shape)}"
                raise FadeError(
                    f"{str(path)!r} holds no weights of LPIPS with {self._network.name}: {key} {told}; save the state "
                    'dict of lpips.LPIPS(net="alex") or (net="vgg") as safetensors'
                )
        self._tensors = {key: tensors[key].float().to(device) for key in self._network.shapes()}
        self._device = torch.device(device)
        self.name = f"LPIPS with {self._network.name}, {path.name}"

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Of every pair of pictures, float [n, 3, H, W] in [0, 1] on both sides: float64 [n] on the CPU.

        Raises FadeError for pictures that are too small for the network.
        """
        if min(first.shape[-2:]) < self._network.smallest:
            least, (height, width) = self._network.smallest, first.shape[-2:]
            raise FadeError(f"{self.name} needs pictures of {least} × {least} pixels at least, not {height} × {width}")
        pairs = zip(first.split(_AT_ONCE), second.split(_AT_ONCE), strict=True)
        return torch.cat([self._of(one, other) for one, other in pairs])

    def _of(self, first: Tensor, second: Tensor) -> Tensor:
        shift, scale = (torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        sides = [
            self._network.features((2 * images.to(self._device) - 1 - shift) / scale, self._tensors)
            for images in (first, second)
        ]
        total = torch.zeros(len(first), dtype=torch.float64)
        for part, layers in enumerate(zip(*sides, strict=True)):
            one, other = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in layers)
            weighed = F.conv2d((one - other).square(), self._tensors[f"lin{part}.model.1.weight"])
            total += weighed.mean((1, 2, 3)).double().cpu()
        return total


def distances(drawn: Drawn) -> Tensor:
    """Of every pair of pictures: float64 [n]."""
    assert drawn.lpips is not None
    return drawn.lpips(drawn.base, drawn.adapted)


METRICS = (
    Metric(
        "LPIPS",
        "perceptual change of retained images",
        "",
        "lower",
        mean_of(distances, forgotten=False),
        4,
        needs="lpips",
    ),
    Metric(
        "LPIPS_forget",
        "the same of forgotten images",
        "",
        "higher",
        mean_of(distances, forgotten=True),
        4,
        needs="lpips",
    ),
)
