"""Layer shapes of public diffusion models as data, so that benchmarks need neither diffusers nor a download.

Tokens are those of one image, at 512 pixels for Stable Diffusion 1.5 and at 1024 for the others; counts are calls in
one forward pass of the denoiser. Sources are the models' own `config.json` (SD 1.5: channels 320, 640, 1280, 1280, two
layers a block, text width 768; SDXL: channels 320, 640, 1280, transformer depths 0, 2, 10, text width 2048; Stable
Diffusion 3.5 large: 38 joint blocks of width 2432, 333 text tokens; FLUX.1: 19 double and 38 single blocks of width
3072, 512 text tokens). A test compares every entry with diffusers' own modules.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """One kind of linear layer: [tokens, in_features] -> [tokens, out_features], and how often a model has it."""

    tokens: int
    out_features: int
    in_features: int
    bias: bool
    count: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.in_features} -> {self.out_features}{' + bias' if self.bias else ''}"


@dataclass(frozen=True)
class Conv2d:
    """One kind of convolution with bias: [images, in_channels, size, size], square kernel, padding kernel // 2."""

    images: int
    in_channels: int
    out_channels: int
    size: int
    kernel: int
    stride: int
    count: int

    @property
    def size_out(self) -> int:
        return self.size // self.stride

    def as_linear(self) -> Linear:
        """The matrix product that it is: one row per output pixel, one column per weight of an output channel."""
        pixels = self.images * self.size_out**2
        return Linear(pixels, self.out_channels, self.in_channels * self.kernel**2, bias=True, count=self.count)

    def __str__(self) -> str:
        window = f"{self.kernel}x{self.kernel}{f' / {self.stride}' if self.stride > 1 else ''}"
        return f"{self.images} x {self.in_channels} x {self.size}² -> {self.out_channels}, {window}"


@dataclass(frozen=True)
class Model:
    """Layers of one model's denoiser for one image.

    Attributes:
        attention: the projections q, k, v and out of every attention (also those of the text stream).
        other: every other linear layer.
        conv: convolutions; empty where they are not listed.
        batch: images at which kernels.md states its targets.
        pixels: side of an image.
    """

    name: str
    pixels: int
    batch: int
    attention: tuple[Linear, ...]
    other: tuple[Linear, ...]
    conv: tuple[Conv2d, ...] = ()


def batched(layers: tuple[Linear, ...], batch: int) -> list[Linear]:
    """The same layers for a batch of images: tokens grow with it."""
    return [Linear(batch * x.tokens, x.out_features, x.in_features, x.bias, x.count) for x in layers]


def _linears(*rows: tuple[int, int, int, bool, int]) -> tuple[Linear, ...]:
    """Rows of (tokens, in_features, out_features, bias, count)."""
    return tuple(Linear(tokens, n, k, bias, count) for tokens, k, n, bias, count in rows)


def _convs(*rows: tuple[int, int, int, int, int, int]) -> tuple[Conv2d, ...]:
    """Rows of (in_channels, out_channels, size, kernel, stride, count)."""
    return tuple(Conv2d(1, *row) for row in rows)


TEXT_TOKENS, TEXT_FEATURES = 77, 768
# (channels, image tokens at 512 pixels, transformer blocks)
SD15_BLOCKS = ((320, 4096, 5), (640, 1024, 5), (1280, 256, 5), (1280, 64, 1))


def sd15_attention(batch: int = 1) -> list[Linear]:
    """The attention projections of Stable Diffusion 1.5: q, k, v, out of self- and of cross-attention.

    Args:
        batch: images; tokens grow with it.
    """
    layers = []
    for channels, tokens, blocks in SD15_BLOCKS:
        layers.append(Linear(batch * tokens, channels, channels, bias=False, count=4 * blocks))
        layers.append(Linear(batch * tokens, channels, channels, bias=True, count=2 * blocks))
    for channels in (320, 640, 1280):
        blocks = sum(count for width, _, count in SD15_BLOCKS if width == channels)
        layers.append(Linear(batch * TEXT_TOKENS, channels, TEXT_FEATURES, bias=False, count=2 * blocks))
    return layers


SD15 = Model(
    "SD 1.5",
    pixels=512,
    batch=8,
    attention=tuple(sd15_attention()),
    other=_linears(
        (4096, 320, 2560, True, 5), (4096, 1280, 320, True, 5), (1024, 640, 5120, True, 5), (1024, 2560, 640, True, 5),
        (256, 1280, 10240, True, 5), (256, 5120, 1280, True, 5), (64, 1280, 10240, True, 1), (64, 5120, 1280, True, 1),
        (1, 1280, 320, True, 5), (1, 1280, 640, True, 5), (1, 1280, 1280, True, 13), (1, 320, 1280, True, 1),
    ),
    conv=_convs(
        (4, 320, 64, 3, 1, 1), (320, 4, 64, 3, 1, 1), (320, 320, 64, 1, 1, 10), (320, 320, 64, 3, 1, 7),
        (320, 320, 64, 3, 2, 1), (320, 640, 32, 1, 1, 1), (320, 640, 32, 3, 1, 1), (640, 320, 64, 1, 1, 2),
        (640, 320, 64, 3, 1, 2), (640, 640, 32, 1, 1, 10), (640, 640, 32, 3, 1, 6), (640, 640, 32, 3, 2, 1),
        (640, 640, 64, 3, 1, 1), (640, 1280, 16, 1, 1, 1), (640, 1280, 16, 3, 1, 1), (960, 320, 64, 1, 1, 1),
        (960, 320, 64, 3, 1, 1), (960, 640, 32, 1, 1, 1), (960, 640, 32, 3, 1, 1), (1280, 640, 32, 1, 1, 1),
        (1280, 640, 32, 3, 1, 1), (1280, 1280, 8, 1, 1, 2), (1280, 1280, 8, 3, 1, 11), (1280, 1280, 16, 1, 1, 10),
        (1280, 1280, 16, 3, 1, 7), (1280, 1280, 16, 3, 2, 1), (1280, 1280, 32, 3, 1, 1), (1920, 640, 32, 1, 1, 1),
        (1920, 640, 32, 3, 1, 1), (1920, 1280, 16, 1, 1, 1), (1920, 1280, 16, 3, 1, 1), (2560, 1280, 8, 1, 1, 3),
        (2560, 1280, 8, 3, 1, 3), (2560, 1280, 16, 1, 1, 2), (2560, 1280, 16, 3, 1, 2),
    ),
)  # fmt: skip

SDXL = Model(
    "SDXL",
    pixels=1024,
    batch=4,
    attention=_linears(
        (4096, 640, 640, False, 40), (4096, 640, 640, True, 20), (1024, 1280, 1280, False, 240),
        (1024, 1280, 1280, True, 120), (77, 2048, 640, False, 20), (77, 2048, 1280, False, 120),
    ),
    other=_linears(
        (4096, 640, 640, True, 10), (4096, 640, 5120, True, 10), (4096, 2560, 640, True, 10),
        (1024, 1280, 1280, True, 12), (1024, 1280, 10240, True, 60), (1024, 5120, 1280, True, 60),
        (1, 1280, 320, True, 5), (1, 1280, 640, True, 5), (1, 1280, 1280, True, 9), (1, 320, 1280, True, 1),
        (1, 2816, 1280, True, 1),
    ),
)  # fmt: skip

SD35 = Model(
    "SD 3.5 large",
    pixels=1024,
    batch=2,
    attention=_linears((4096, 2432, 2432, True, 152), (333, 2432, 2432, True, 151)),
    other=_linears(
        (4096, 2432, 9728, True, 38), (4096, 9728, 2432, True, 38), (333, 2432, 9728, True, 37),
        (333, 9728, 2432, True, 37), (1, 2432, 14592, True, 75), (1, 2432, 4864, True, 2), (333, 4096, 2432, True, 1),
        (4096, 2432, 64, True, 1), (1, 256, 2432, True, 1), (1, 2048, 2432, True, 1), (1, 2432, 2432, True, 2),
    ),
)  # fmt: skip

FLUX1 = Model(
    "FLUX.1",
    pixels=1024,
    batch=2,
    attention=_linears((4608, 3072, 3072, True, 114), (4096, 3072, 3072, True, 76), (512, 3072, 3072, True, 76)),
    other=_linears(
        (4608, 3072, 12288, True, 38), (4608, 15360, 3072, True, 38), (4096, 3072, 12288, True, 19),
        (4096, 12288, 3072, True, 19), (512, 3072, 12288, True, 19), (512, 12288, 3072, True, 19),
        (1, 3072, 9216, True, 38), (1, 3072, 18432, True, 38), (1, 3072, 6144, True, 1), (512, 4096, 3072, True, 1),
        (4096, 64, 3072, True, 1), (4096, 3072, 64, True, 1), (1, 256, 3072, True, 2), (1, 768, 3072, True, 1),
        (1, 3072, 3072, True, 3),
    ),
)  # fmt: skip

MODELS = (SD15, SDXL, SD35, FLUX1)
