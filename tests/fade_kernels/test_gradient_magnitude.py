"""Streaming saliency: the accumulating operators against float64, GradientMagnitude against plain autograd."""

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from kernel_testing import OPS, generator, opcheck, relative_error
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fade_kernels import (
    GradientMagnitude,
    accumulate_gradient_magnitude_,
    accumulate_linear_gradient_magnitude_,
    reference,
)

# The network has such a layer on purpose: its padding is not the same on both sides.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

MODES = ["abs", "signed", "square"]
GRADIENT_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def magnitude(gradient: Tensor, mode: str) -> Tensor:
    return {"abs": gradient.abs(), "signed": gradient, "square": gradient * gradient}[mode]


# --- the operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
def test_accumulate_many_tensors(mode: str, dtype: torch.dtype) -> None:
    random = generator(1)
    shapes = [(1,), (7, 33), (0, 4), (5, 3, 3, 3), (400, 300), (), (2, 65536)]
    saliency = [torch.rand(shape, generator=random) for shape in shapes]
    gradient = [(torch.randn(shape, generator=random) * 10).to(dtype) for shape in shapes]
    expected = [s.double() + magnitude(g.double(), mode) for s, g in zip(saliency, gradient, strict=True)]
    by_definition = [s.clone() for s in saliency]
    accumulate_gradient_magnitude_(saliency, gradient, mode)
    reference.accumulate_gradient_magnitude_(by_definition, gradient, mode)
    for s, d, e in zip(saliency, by_definition, expected, strict=True):
        assert relative_error(s, e) < 2e-7
        assert relative_error(d, e) < 2e-7


def test_every_half_precision_value_is_converted_exactly() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        gradient = patterns.view(dtype)
        saliency = torch.zeros(2**16)
        accumulate_gradient_magnitude_([saliency], [gradient], "signed")
        # + 0.0 as the accumulator adds to zero: -0 becomes 0
        assert torch.equal(
            saliency.nan_to_num(-7.0, 1e39, -1e39), (gradient.float() + 0.0).nan_to_num(-7.0, 1e39, -1e39)
        )


def test_strided_gradients_and_accumulators() -> None:
    random = generator(2)
    gradient = torch.randn(6, 4, 3, 3, generator=random)
    start = torch.rand(6, 4, 3, 3, generator=random)
    expected = start + gradient.abs()
    for s_format in (torch.contiguous_format, torch.channels_last):
        for g_format in (torch.contiguous_format, torch.channels_last):
            saliency = start.clone().contiguous(memory_format=s_format)
            accumulate_gradient_magnitude_([saliency], [gradient.contiguous(memory_format=g_format)])
            assert torch.equal(saliency, expected)
    wide = torch.zeros(10, 20)
    accumulate_gradient_magnitude_([wide[:, ::2]], [torch.ones(10, 10).t()])
    assert torch.equal(wide, torch.tensor([1.0, 0.0]).repeat(10, 10))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("leading", "rows", "columns"),
    [((5,), 3, 7), ((4, 9), 33, 65), ((2, 3, 4), 8, 8), ((1, 1), 1, 1), ((3, 50), 700, 1000), ((2, 2), 40, 20000)],
)
def test_accumulate_linear(mode: str, per_sample: bool, leading: tuple[int, ...], rows: int, columns: int) -> None:
    random = generator(3)
    dy = torch.randn(*leading, rows, generator=random)
    x = torch.randn(*leading, columns, generator=random)
    saliency = torch.rand(rows, columns, generator=random)
    groups = leading[0] if per_sample else 1
    expected = saliency.double()
    for dy_i, x_i in zip(dy.double().reshape(groups, -1, rows), x.double().reshape(groups, -1, columns), strict=True):
        expected += magnitude(dy_i.T @ x_i, mode)
    by_definition = saliency.double()
    reference.accumulate_linear_gradient_magnitude_(by_definition, dy, x, mode, per_sample)
    assert relative_error(by_definition, expected) < 1e-12
    accumulate_linear_gradient_magnitude_(saliency, dy, x, mode, per_sample)
    assert relative_error(saliency, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_accumulate_linear_other_dtypes(dtype: torch.dtype) -> None:
    """16-bit inputs are multiplied in fp32, so the result is that of fp32, not of a rounded 16-bit gradient."""
    random = generator(4)
    dy, x = (torch.randn(3, 40, size, generator=random).to(dtype) for size in (20, 30))
    expected = (dy.double().reshape(-1, 20).T @ x.double().reshape(-1, 30)).abs()
    saliency = torch.zeros(20, 30)
    accumulate_linear_gradient_magnitude_(saliency, dy, x)
    assert relative_error(saliency, expected) < 1e-6
    mixed = torch.zeros(20, 30)
    accumulate_linear_gradient_magnitude_(mixed, dy, x.float())
    assert relative_error(mixed, expected) < 1e-6


def test_accumulate_linear_strided_and_empty() -> None:
    random = generator(5)
    dy, x = torch.randn(6, 4, 5, generator=random), torch.randn(8, 4, 5, generator=random)
    expected = torch.einsum("nab,kab->nk", dy.double(), x.double()).abs()
    transposed = torch.zeros(8, 6).t()
    accumulate_linear_gradient_magnitude_(transposed, dy.permute(1, 2, 0), x.permute(1, 2, 0))
    assert relative_error(transposed, expected) < 1e-6
    for per_sample in (False, True):
        saliency = torch.ones(6, 8)
        accumulate_linear_gradient_magnitude_(saliency, torch.zeros(0, 4, 6), torch.zeros(0, 4, 8), "abs", per_sample)
        accumulate_linear_gradient_magnitude_(saliency, torch.zeros(3, 0, 6), torch.zeros(3, 0, 8), "abs", per_sample)
        assert torch.equal(saliency, torch.ones(6, 8))
    vector = torch.zeros(2, 3)
    accumulate_linear_gradient_magnitude_(vector, torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.0, 3.0]))
    assert vector.tolist() == [[1.0, 0.0, 3.0], [2.0, 0.0, 6.0]]
    accumulate_linear_gradient_magnitude_(torch.zeros(0, 3), torch.zeros(4, 0), torch.zeros(4, 3))


def test_operators_pass_opcheck() -> None:
    random = generator(6)
    dy, x = torch.randn(3, 4, 5, generator=random), torch.randn(3, 4, 7, generator=random)
    for mode in MODES:
        opcheck(OPS.accumulate_linear_gradient_magnitude_, (torch.zeros(5, 7), dy, x, mode, True))
    opcheck(OPS.accumulate_linear_gradient_magnitude_, (torch.zeros(5, 7), dy.half(), x.bfloat16(), "abs", False))
    pair = [torch.zeros(3, 4), torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last)]
    gradients = [torch.randn(3, 4, generator=random), torch.randn(2, 3, 2, 2, generator=random).half()]
    opcheck(OPS.accumulate_gradient_magnitude_, (pair, gradients, "abs"))


def test_operator_errors_say_what_to_do() -> None:
    s, dy, x = torch.zeros(2, 3), torch.zeros(4, 2), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="one of abs, signed, square"):
        accumulate_gradient_magnitude_([s], [s], "l2")
    with pytest.raises(ValueError, match="one gradient per accumulator"):
        accumulate_gradient_magnitude_([s], [])
    with pytest.raises(ValueError, match="only once"):
        accumulate_gradient_magnitude_([s, s], [s, s])
    with pytest.raises(TypeError, match=r"saliency\[0\] must be float32"):
        accumulate_gradient_magnitude_([s.half()], [s])
    with pytest.raises(TypeError, match=r"gradient\[0\] must be float32"):
        accumulate_gradient_magnitude_([s], [s.int()])
    with pytest.raises(ValueError, match=r"gradient\[0\] is \[4, 3\]"):
        accumulate_gradient_magnitude_([s], [x])
    with pytest.raises(ValueError, match="one device"):
        accumulate_gradient_magnitude_([s], [s.to("meta")])
    with pytest.raises(ValueError, match=r"must fit an accumulator \[N, K\]"):
        accumulate_linear_gradient_magnitude_(s, dy, x[:3])
    with pytest.raises(ValueError, match=r"must fit an accumulator \[N, K\]"):
        accumulate_linear_gradient_magnitude_(s, x, dy)
    with pytest.raises(ValueError, match=r"must be \[N, K\]"):
        accumulate_linear_gradient_magnitude_(s[0], dy, x)
    with pytest.raises(TypeError, match="saliency must be float32"):
        accumulate_linear_gradient_magnitude_(s.double(), dy, x)
    with pytest.raises(ValueError, match="leading sample dimension"):
        accumulate_linear_gradient_magnitude_(s, dy[0], x[0], per_sample=True)


MEMORY_SCRIPT = """
import torch
from bench.harness import peak_memory
from fade_kernels import accumulate_linear_gradient_magnitude_, select_top_fraction
saliency = torch.zeros(5120, 5120)
dy, x = torch.randn(16, 5120), torch.randn(16, 5120)
accumulate_linear_gradient_magnitude_(torch.zeros(64, 5120), dy[:, :64], x)
with peak_memory() as linear:
    accumulate_linear_gradient_magnitude_(saliency, dy, x)
with peak_memory() as selection:
    select_top_fraction([saliency], 0.1)
print(linear.extra, selection.extra)
"""


def test_memory_of_accumulation_and_selection() -> None:
    """A gradient of 105 MB is never held, and its 26 million accumulators are selected from without a copy."""
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    linear, selection = map(int, done.stdout.split())
    assert linear < 24 * 2**20
    assert selection < 16 * 2**20


# --- GradientMagnitude -----------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Convolutions of every kind, an in-place activation behind a frozen first layer, and layers used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.same = nn.Conv2d(8, 8, (2, 4), padding="same", bias=False)
        self.circular = nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular")
        self.point = nn.Conv2d(12, 10, 1)
        self.up = nn.Linear(10, 18)
        self.twice = nn.Linear(18, 18)
        self.last = nn.Linear(18, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = torch.tanh(self.grouped(x))
        x = x + self.same(self.same(x))
        x = self.point(self.circular(x)).flatten(2).transpose(1, 2)
        x = torch.tanh(self.up(x))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.last(x[:, ::2])


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def weight_gradients(network: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Plain autograd, with every gradient kept."""
    layers = layers_of(network)
    weights = [layer.weight for layer in layers.values()]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    for weight in weights:
        weight.requires_grad_(False)
    return {
        name: torch.zeros_like(w) if g is None else g for name, w, g in zip(layers, weights, gradients, strict=True)
    }


def network_and_batches(dtype: torch.dtype = torch.float32) -> tuple[Network, list[Tensor]]:
    torch.manual_seed(7)
    network = Network().to(dtype).requires_grad_(False)
    return network, [torch.randn(4, 3, 10, 10, dtype=dtype) * scale for scale in (1.0, 2.0, 0.5)]


def assert_saliency(watch: GradientMagnitude, expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert watch.saliency.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, f"{name}: a test that cannot fail"
        assert relative_error(watch.saliency[name], value) < tolerance, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_against_autograd(mode: str, per_sample: bool) -> None:
    network, batches = network_and_batches()
    expected = {name: torch.zeros_like(layer.weight) for name, layer in layers_of(network).items()}
    for batch in batches:
        groups = range(len(batch)) if per_sample else [slice(None)]
        for i in groups:
            gradients = weight_gradients(network, lambda i=i, batch=batch: network(batch)[i].square().sum())
            for name in expected:
                expected[name] += magnitude(gradients[name], mode)
    if mode == "signed":
        expected = {name: value.abs() for name, value in expected.items()}
    with GradientMagnitude(layers_of(network), mode, per_sample) as watch:
        for batch in batches:
            network(batch).square().sum().backward()
    assert_saliency(watch, expected)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 3, 4, 6), (0, 6)])
def test_linear_inputs_of_any_dimensions(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(6, 4).requires_grad_(False)
    x = torch.randn(shape, generator=generator(8))
    expected = weight_gradients(nn.Sequential(layer), lambda: layer(x).square().sum())["0"].abs()
    with GradientMagnitude({"layer": layer}) as watch:
        layer(x).square().sum().backward()
    assert relative_error(watch.saliency["layer"], expected) < 1e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_layouts_and_unbatched_input(layout: torch.memory_format) -> None:
    layer = nn.Conv2d(4, 6, 3).to(memory_format=layout).requires_grad_(False)
    x = torch.randn(2, 4, 7, 7, generator=generator(9)).to(memory_format=layout)
    expected = weight_gradients(nn.Sequential(layer), lambda: layer(x).square().sum())["0"].abs()
    single = weight_gradients(nn.Sequential(layer), lambda: layer(x[0]).square().sum())["0"].abs()
    with GradientMagnitude({"layer": layer}) as watch:
        layer(x).square().sum().backward()
        layer(x[0]).square().sum().backward()
    assert relative_error(watch.saliency["layer"], expected + single) < 1e-6


@pytest.mark.parametrize("per_sample", [False, True])
def test_convolution_called_on_several_sizes(per_sample: bool) -> None:
    layer = nn.Conv2d(2, 3, 3).requires_grad_(False)
    inputs = [torch.randn(4, 2, size, size, generator=generator(size)) for size in (5, 9, 5)]

    def loss(samples: slice) -> Tensor:
        return sum(layer(x[samples]).pow(3).sum() for x in inputs)

    groups = [slice(i, i + 1) for i in range(4)] if per_sample else [slice(None)]
    expected = sum(weight_gradients(nn.Sequential(layer), lambda g=g: loss(g))["0"].abs() for g in groups)
    with GradientMagnitude({"layer": layer}, per_sample=per_sample) as watch:
        loss(slice(None)).backward()
    assert relative_error(watch.saliency["layer"], expected) < 1e-5


def test_calls_without_a_gradient() -> None:
    """Unused outputs, thrown-away graphs and no_grad calls neither count nor keep a layer waiting for ever."""
    layer = nn.Linear(5, 5).requires_grad_(False)
    x = torch.randn(3, 5, generator=generator(10))
    expected = weight_gradients(nn.Sequential(layer), lambda: layer(x).square().sum())["0"].abs()
    with GradientMagnitude({"layer": layer}) as watch:
        with torch.no_grad():
            layer(x)
        with torch.inference_mode():
            layer(x)
        layer(x)  # its graph is gone at once
        unused = layer(2 * x)
        layer(x).square().sum().backward()
        assert relative_error(watch.saliency["layer"], expected) < 1e-6
        del unused
        layer(x).square().sum().backward()
    assert relative_error(watch.saliency["layer"], 2 * expected) < 1e-6


def test_forward_passes_before_one_backward_are_one_gradient() -> None:
    network, (a, b, _) = network_and_batches()
    one = weight_gradients(network, lambda: network(a).square().sum() - network(b).square().sum())
    with GradientMagnitude(layers_of(network)) as watch:
        (network(a).square().sum() - network(b).square().sum()).backward()
    assert_saliency(watch, {name: gradient.abs() for name, gradient in one.items()}, tolerance=1e-4)  # the two cancel


def test_forward_passes_with_a_backward_each_are_separate() -> None:
    network, (a, b, _) = network_and_batches()
    first = weight_gradients(network, lambda: network(a).square().sum())
    second = weight_gradients(network, lambda: network(b).square().sum())
    with GradientMagnitude(layers_of(network)) as watch:
        loss_a, loss_b = network(a).square().sum(), network(b).square().sum()
        loss_a.backward()
        loss_b.backward()
    assert_saliency(watch, {name: first[name].abs() + second[name].abs() for name in first})


def test_upstream_gradients_are_unchanged() -> None:
    network, (a, *_) = network_and_batches()
    plain, watched = a.clone().requires_grad_(True), a.clone().requires_grad_(True)
    network(plain).square().sum().backward()
    with GradientMagnitude(layers_of(network)) as watch:
        network(watched).square().sum().backward()
    assert torch.equal(plain.grad, watched.grad)
    expected = weight_gradients(network, lambda: network(a).square().sum())
    assert_saliency(watch, {name: gradient.abs() for name, gradient in expected.items()})


def test_checkpointing() -> None:
    network, (a, *_) = network_and_batches()
    expected = weight_gradients(network, lambda: network(a).square().sum())
    for reentrant in (False, True):
        with GradientMagnitude(layers_of(network)) as watch:
            x = a.clone().requires_grad_(reentrant)
            checkpoint(network, x, use_reentrant=reentrant).square().sum().backward()
        assert_saliency(watch, {name: gradient.abs() for name, gradient in expected.items()})


class Blocks(nn.Module):
    """Six blocks of two layers, checkpointed (`reentrant` says how) or not (None); remembers its layers' inputs."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 12)) for _ in range(6))
        self.inputs: list[weakref.ref] = []
        for layer in layers_of(self).values():
            layer.register_forward_pre_hook(lambda _, args: self.inputs.append(weakref.ref(args[0].untyped_storage())))

    def alive(self) -> int:
        return len({id(storage) for input in self.inputs if (storage := input()) is not None})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = x.sin()
            x = x + (block(y) if self.reentrant is None else checkpoint(block, y, use_reentrant=self.reentrant))
            del y
        return x


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
def test_checkpointing_keeps_its_memory(reentrant: bool | None) -> None:
    """Of the inputs inside of checkpointed blocks none is alive after the forward pass, and one block's in the
    backward pass; each is freed with its gradient."""
    torch.manual_seed(11)
    plain = Blocks(None).requires_grad_(False)
    network = Blocks(reentrant).requires_grad_(False)
    network.load_state_dict(plain.state_dict())
    x = torch.randn(3, 12, requires_grad=reentrant is True)
    expected = weight_gradients(plain, lambda: plain(x).square().sum())
    with GradientMagnitude(layers_of(network)) as watch:
        alive, folds = [], watch._layers[0].fold.__func__

        def fold(layer, *args):
            folds(layer, *args)
            alive.append(network.alive())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(watch._layers[0]), "fold", fold)
            loss = network(x).square().sum()
            kept = network.alive()
            loss.backward()
    assert len(alive) == 12
    assert kept == (12 if reentrant is None else 6)  # what goes into a block is what checkpointing keeps
    if reentrant is not None:
        assert max(alive) <= 6 + 2
    assert alive[-1] <= 1
    assert_saliency(watch, {name: gradient.abs() for name, gradient in expected.items()})


def test_saved_tensor_hooks_have_the_layers_inputs() -> None:
    network, (a, *_) = network_and_batches()
    expected = weight_gradients(network, lambda: network(a).square().sum())
    packed = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.clone())
        return len(packed) - 1

    with GradientMagnitude(layers_of(network)) as watch:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
            loss = network(a).square().sum()
        loss.backward()
    assert any(torch.equal(tensor, a) for tensor in packed)  # which nothing else keeps
    assert_saliency(watch, {name: gradient.abs() for name, gradient in expected.items()})


def test_inputs_made_in_inference_mode() -> None:
    layer = nn.Linear(5, 4).requires_grad_(False)
    with torch.inference_mode():
        x = torch.randn(3, 5, generator=generator(12))
    with GradientMagnitude({"layer": layer}) as watch:
        layer(x).square().sum().backward()
    expected = weight_gradients(nn.Sequential(layer), lambda: layer(x.clone()).square().sum())["0"].abs()
    assert relative_error(watch.saliency["layer"], expected) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_accumulators_on_the_host_have_the_same_bits(mode: str, per_sample: bool) -> None:
    network, batches = network_and_batches()
    found = []
    for on_host in (False, True):
        with GradientMagnitude(layers_of(network), mode, per_sample, on_host=on_host) as watch:
            for batch in batches:
                network(batch).square().sum().backward()
        found.append(watch.saliency)
    for name, value in found[0].items():
        assert value.abs().max() > 0 and torch.equal(found[1][name], value)
        assert found[1][name].device.type == "cpu"


def test_autocast() -> None:
    network, (a, *_) = network_and_batches()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(a).float().square().sum()

    expected = weight_gradients(network, loss)
    with GradientMagnitude(layers_of(network)) as watch:
        loss().backward()
    assert_saliency(watch, {name: gradient.abs() for name, gradient in expected.items()}, tolerance=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_model_dtypes(dtype: torch.dtype) -> None:
    network, (a, *_) = network_and_batches(dtype)
    expected = weight_gradients(network, lambda: network(a).square().sum())
    with GradientMagnitude(layers_of(network)) as watch:
        network(a).square().sum().backward()
    assert all(s.dtype == torch.float32 for s in watch.saliency.values())
    tolerance = 2e-6 if dtype == torch.float64 else 2e-2
    assert_saliency(watch, {name: gradient.abs() for name, gradient in expected.items()}, tolerance)


def test_weights_that_require_gradients_get_none_and_are_restored() -> None:
    layer = nn.Linear(3, 3)
    with GradientMagnitude({"layer": layer}) as watch:
        layer(torch.ones(2, 3)).sum().backward()
    assert layer.weight.grad is None
    assert layer.weight.requires_grad
    assert layer.bias.grad is not None
    assert torch.equal(watch.saliency["layer"], torch.full((3, 3), 2.0))
    layer(torch.ones(2, 3)).sum().backward()
    assert torch.equal(watch.saliency["layer"], torch.full((3, 3), 2.0))
    assert not layer._forward_hooks


def test_input_changed_in_place_is_an_error() -> None:
    layer = nn.Linear(3, 3).requires_grad_(False)
    x = torch.ones(2, 3)
    with GradientMagnitude({"mid.to_q": layer}):
        loss = layer(x).sum()
        x.mul_(2)
        with pytest.raises(RuntimeError, match=r"input of layer 'mid.to_q' was changed in place"):
            loss.backward()


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_layers_input_is_freed_when_its_gradient_is_folded(retain_graph: bool) -> None:
    first, second = (nn.Linear(3, 3, bias=False).requires_grad_(False) for _ in range(2))
    with GradientMagnitude({"first": first, "second": second}) as watch:
        x = torch.ones(2, 3)
        freed = weakref.ref(x.untyped_storage())
        loss = second(first(x) * 2).sum()
        del x
        assert freed() is not None
        loss.backward(retain_graph=retain_graph)  # the graph lives on, in `loss`
        assert (freed() is not None) == retain_graph
        if retain_graph:
            once = {name: saliency.clone() for name, saliency in watch.saliency.items()}
            loss.backward()
            assert all(torch.equal(watch.saliency[name], 2 * once[name]) for name in once)
            assert freed() is None
        with pytest.raises(RuntimeError, match="a second (backward pass reached layer 'second'|time)"):
            loss.backward()


def test_errors_say_what_to_do() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no layers to watch"):
        GradientMagnitude({})
    with pytest.raises(TypeError, match=r"'norm' must be nn.Linear or nn.Conv2d, not LayerNorm"):
        GradientMagnitude({"norm": nn.LayerNorm(3)})
    with pytest.raises(ValueError, match="two names"):
        GradientMagnitude({"a": layer, "b": layer})
    with pytest.raises(ValueError, match="mode must be"):
        GradientMagnitude({"a": layer}, mode="max")
    watch = GradientMagnitude({"a": layer})
    with watch:
        pass
    with pytest.raises(RuntimeError, match="make a new one"):
        watch.__enter__()
    shared = nn.Linear(3, 3).requires_grad_(False)
    with (
        GradientMagnitude({"shared": shared}, per_sample=True),
        pytest.raises(ValueError, match=r"same number of samples in every call of layer 'shared'.*\[2, 4\]"),
    ):
        (shared(torch.ones(2, 3)).sum() + shared(torch.ones(4, 3)).sum()).backward()


class LiveGradients(TorchDispatchMode):
    """Counts, after every operation, the living tensors in the shape of a weight that are not among those known."""

    def __init__(self, network: nn.Module, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.shapes = {tuple(layer.weight.shape) for layer in layers_of(network).values()}
        self.known = {StorageWeakRef(t.untyped_storage()).cdata for t in (*network.parameters(), *known)}
        self.live: dict[int, StorageWeakRef] = {}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() >= 2:
                shape = tuple(tensor.shape)
                if shape in self.shapes or shape[::-1] in self.shapes:
                    storage = StorageWeakRef(tensor.untyped_storage())
                    if storage.cdata not in self.known:
                        self.live[storage.cdata] = storage
        self.live = {key: storage for key, storage in self.live.items() if not storage.expired()}
        self.largest = max(self.largest, len(self.live))
        return result


def test_at_most_one_weight_gradient_lives() -> None:
    network, (a, *_) = network_and_batches()
    watch = GradientMagnitude(layers_of(network))
    with watch, LiveGradients(network, watch.saliency.values()) as streamed:
        network(a).square().sum().backward()
    assert streamed.largest == 1
    network.requires_grad_(True)
    with LiveGradients(network) as kept:
        network(a).square().sum().backward()
    assert kept.largest >= len(layers_of(network))
