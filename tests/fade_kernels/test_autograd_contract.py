"""What autograd and torch promise of their own operators, of these: second derivatives, forward mode, functorch, and
that whatever is written in place is seen to be.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_testing import OPS, generator
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fade_kernels
from fade_kernels import BitMask, reference
from fade_kernels._ops import conv2d as define_conv2d
from fade_kernels._ops import linear as define_linear
from fade_kernels.masked_lora import REGIMES, force_regime

SCALE = 0.7


class Problem:
    """Fresh float64 arguments of every differentiable function, as calls of leaves, and the same as plain formulas."""

    def __init__(self, seed: int) -> None:
        self.random = generator(seed)
        self.dense = torch.rand(5, 35, generator=self.random) < 0.4
        self.mask = BitMask.pack(self.dense)
        self.weight, self.bias = self.normal(5, 35), self.normal(5)
        self.kernel_dense = torch.rand(4, 2, 3, 3, generator=self.random) < 0.5
        self.kernel_mask = BitMask.pack(self.kernel_dense)
        self.kernel = self.normal(4, 2, 3, 3)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.random, dtype=torch.float64)

    def leaves(self, name: str) -> list[Tensor]:
        factors, kernel_factors = [(2, 35), (5, 2)], [(3, 2, 3, 3), (4, 3, 1, 1)]
        shapes = {
            "linear": [(3, 35), *factors],
            "linear, alone": [(3, 35), *factors],
            "linear, unfrozen": [(3, 35), *factors, (5, 35), (5,)],
            "values": [(3, 35), (self.mask.count,)],
            "effective weight": [(5, 35), *factors],
            "factor values": factors,
            "convolution": [(1, 2, 5, 4), *kernel_factors],
            "values, convolution": [(1, 2, 5, 4), (self.kernel_mask.count,)],
        }
        return [self.normal(*shape) for shape in shapes[name]]

    def function(self, name: str) -> Callable[..., Tensor]:
        mask, weight, bias, kernel, kernel_mask = self.mask, self.weight, self.bias, self.kernel, self.kernel_mask
        return {
            "linear": lambda x, a, b: fade_kernels.masked_lora_linear(x, weight, bias, a, b, mask, SCALE),
            "linear, alone": lambda x, a, b: fade_kernels.masked_lora_linear(x, None, None, a, b, mask, SCALE),
            "linear, unfrozen": lambda x, a, b, w, c: fade_kernels.masked_lora_linear(x, w, c, a, b, mask, SCALE),
            "values": lambda x, v: fade_kernels.masked_values_linear(x, weight, bias, v, mask, SCALE),
            "effective weight": lambda w, a, b: fade_kernels.effective_weight(w, a, b, mask, SCALE),
            "factor values": lambda a, b: fade_kernels.masked_factor_values(a, b, mask),
            "convolution": lambda x, a, b: fade_kernels.masked_lora_conv2d(
                x, kernel, None, a, b, kernel_mask, SCALE, stride=(2, 1), padding=1
            ),
            "values, convolution": lambda x, v: fade_kernels.masked_values_conv2d(
                x, kernel, None, v, kernel_mask, SCALE, stride=(2, 1), padding=1
            ),
        }[name]

    def formula(self, name: str) -> Callable[..., Tensor]:
        weight, bias, kernel = self.weight, self.bias, self.kernel
        small = SCALE * self.dense.double()

        def filled(mask: Tensor, values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, SCALE * values)

        def product(a: Tensor, b: Tensor) -> Tensor:
            flat = b.flatten(1) @ a.flatten(1)
            return torch.where(self.kernel_dense, SCALE * flat.reshape(4, 2, 3, 3), 0.0)

        def convolve(x: Tensor, delta: Tensor) -> Tensor:
            return functional.conv2d(x, kernel + delta, stride=(2, 1), padding=1)

        return {
            "linear": lambda x, a, b: functional.linear(x, weight + small * (b @ a), bias),
            "linear, alone": lambda x, a, b: functional.linear(x, small * (b @ a)),
            "linear, unfrozen": lambda x, a, b, w, c: functional.linear(x, w + small * (b @ a), c),
            "values": lambda x, v: functional.linear(x, weight + filled(self.dense, v), bias),
            "effective weight": lambda w, a, b: w + small * (b @ a),
            "factor values": lambda a, b: (b @ a)[self.dense],
            "convolution": lambda x, a, b: convolve(x, product(a, b)),
            "values, convolution": lambda x, v: convolve(x, filled(self.kernel_dense, v)),
        }[name]


FUNCTIONS = [
    "linear",
    "linear, alone",
    "linear, unfrozen",
    "values",
    "effective weight",
    "factor values",
    "convolution",
    "values, convolution",
]


@pytest.fixture
def problem() -> Problem:
    return Problem(int(torch.seed() % 2**31))


def close(actual: Any, expected: Any) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# --- second derivatives ----------------------------------------------------------------------------------------------


def first_and_second(function: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of a loss and of the squared norm of those gradients."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
    return list(first), list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_gradients(name: str, problem: Problem) -> None:
    leaves = problem.leaves(name)
    for regime in REGIMES if name in ("linear", "values") else ["auto"]:
        with force_regime(regime):
            actual = first_and_second(problem.function(name), leaves)
        for one, other in zip(actual, first_and_second(problem.formula(name), leaves), strict=True):
            close(one, other)


def test_create_graph_where_the_output_gradient_needs_none(problem: Problem) -> None:
    x, a, b = (leaf.requires_grad_() for leaf in problem.leaves("linear"))
    for regime in REGIMES:
        with force_regime(regime):
            (grad,) = torch.autograd.grad(problem.function("linear")(x, a, b).sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(problem.formula("linear")(x, a, b).sum(), x, create_graph=True)
        close([grad], [expected])
        seconds = [torch.autograd.grad(g.square().sum(), (a, b)) for g in (grad, expected)]
        close(*seconds)


def test_a_backward_without_create_graph_runs_the_kernels(monkeypatch: pytest.MonkeyPatch, problem: Problem) -> None:
    """The definitions serve only derivatives of derivatives: everything else would pay for a dense delta."""
    torch_dense = reference._linear_weight_gradient
    called = []
    monkeypatch.setattr(reference, "_linear_weight_gradient", lambda *args: called.append(True) or torch_dense(*args))
    leaves = [leaf.float().requires_grad_() for leaf in problem.leaves("linear")]
    problem.weight, problem.bias = problem.weight.float(), problem.bias.float()
    problem.function("linear")(*leaves).sum().backward()
    if fade_kernels.build_info()["extension"]:
        assert not called
    torch.autograd.grad(problem.function("linear")(*leaves).sum(), leaves, create_graph=True)
    assert called


# --- forward mode and functorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode(name: str, problem: Problem) -> None:
    leaves = problem.leaves(name)
    tangents = [problem.normal(*leaf.shape) for leaf in leaves]
    expected = torch.func.jvp(problem.formula(name), tuple(leaves), tuple(tangents))
    close(torch.func.jvp(problem.function(name), tuple(leaves), tuple(tangents)), expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True)]
        close(forward_ad.unpack_dual(problem.function(name)(*duals)), expected)


def test_forward_mode_of_the_operators_themselves(problem: Problem) -> None:
    x, a, b = problem.leaves("linear")
    words, scale = problem.mask.words, torch.tensor(SCALE, dtype=torch.float64)
    tangent = problem.normal(3, 35)
    dy = problem.normal(3, 5)
    dy_tangent = problem.normal(3, 5)
    delta = torch.where(problem.dense, SCALE * (b @ a), 0.0)
    _, actual = torch.func.jvp(
        lambda x: OPS.masked_lora_linear(x, problem.weight, None, a, b, words, scale, 0), (x,), (tangent,)
    )
    close([actual], [tangent @ (problem.weight + delta).t()])
    _, actual = torch.func.jvp(
        lambda dy: OPS.masked_lora_linear_input_gradient(dy, problem.weight, a, b, words, scale, 0),
        (dy,),
        (dy_tangent,),
    )
    close([actual], [dy_tangent @ (problem.weight + delta)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functorch(name: str, problem: Problem) -> None:
    leaves = tuple(problem.leaves(name))
    every = tuple(range(len(leaves)))

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *leaves: function(*leaves).pow(3).sum()

    actual, expected = loss(problem.function(name)), loss(problem.formula(name))
    close(torch.func.grad(actual, every)(*leaves), torch.func.grad(expected, every)(*leaves))
    first, second = (
        torch.func.grad(lambda *leaves, f=f: sum(g.square().sum() for g in torch.func.grad(f, every)(*leaves)), every)
        for f in (actual, expected)
    )
    close(first(*leaves), second(*leaves))


def test_hessian_and_jacobians(problem: Problem) -> None:
    x, a, b = problem.leaves("linear")
    forms = [lambda a, f=f: f(x, a, b).pow(3).sum() for f in (problem.function("linear"), problem.formula("linear"))]
    close(*([torch.func.hessian(f)(a)] for f in forms))
    close(*([torch.func.jacrev(f)(a)] for f in forms))
    close(*([torch.func.jacfwd(f)(a)] for f in forms))
    per_sample = [
        torch.func.vmap(torch.func.grad(lambda a, x, f=f: f(x[None], a, b).square().sum()), in_dims=(None, 0))(a, x)
        for f in (problem.function("linear"), problem.formula("linear"))
    ]
    close([per_sample[0]], [per_sample[1]])


@pytest.mark.parametrize("name", ["linear", "values", "factor values", "convolution"])
def test_compiled_gradients(name: str, problem: Problem) -> None:
    torch.compiler.reset()
    leaves = [leaf.requires_grad_() for leaf in problem.leaves(name)]
    compiled = torch.compile(problem.function(name), fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves).pow(3).sum(), leaves)
    close(actual, torch.autograd.grad(problem.formula(name)(*leaves).pow(3).sum(), leaves))
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first_and_second(compiled, leaves)


# --- what is written in place ----------------------------------------------------------------------------------------


def writing_schemas() -> dict[str, list[int]]:
    """Operators that write into arguments, and the positions of those."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("fade_kernels::"):
            written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
            if written:
                found[schema.name.removeprefix("fade_kernels::")] = written
    return found


def writing_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator that writes."""
    mask = BitMask.pack(torch.rand(4, 40) < 0.5)
    a, b, w, scale = torch.randn(2, 40), torch.randn(4, 2), torch.randn(4, 40), torch.tensor(0.5)
    by_row = fade_kernels.positions.find_positions(mask.words, 40).by_row
    values = torch.randn(mask.count)
    return {
        "scatter_masked_": (w.clone(), values, mask.words),
        "accumulate_gradient_magnitude_": ([w.clone(), w.clone()], [w, w], "abs"),
        "accumulate_linear_gradient_magnitude_": (w.clone(), torch.randn(3, 4), torch.randn(3, 40), "abs", False),
        "effective_weight_out": (w.clone(), w, a, b, mask.words, scale),
        "effective_weights_out": ([w.clone()], [w], [a], [b], [mask.words], [scale], False, 0),
        "effective_weight_from_values_out": (w.clone(), w, values, mask.words, scale),
        "effective_weights_from_values_out": ([w.clone()], [w], [values], [mask.words], [scale], False, 0),
        "add_gathered_lora_": (torch.zeros(3, 4), torch.randn(3, 40), a, b, *by_row, False, scale),
        "add_gathered_values_": (torch.zeros(3, 4), torch.randn(3, 40), values, None, *by_row[:2], scale),
        "masked_least_squares_rows_": (
            torch.empty(mask.count),
            torch.empty(mask.count),
            torch.tensor(4),
            w,
            torch.eye(40),
            mask.words,
            mask.row_counts.cumsum(0) - mask.row_counts,
            torch.arange(4),
            40,
        ),
    }


@pytest.mark.parametrize("name", writing_schemas())
def test_writing_is_seen(name: str) -> None:
    arguments = writing_calls()[name]

    def tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
        written = [arguments[i] for i in writing_schemas()[name]]
        return [tensor for entry in written for tensor in (entry if isinstance(entry, list) else [entry])]

    before = [tensor._version for tensor in tensors(arguments)]
    getattr(OPS, name)(*arguments)
    assert all(t._version > version for t, version in zip(tensors(arguments), before, strict=True))
    with torch.inference_mode():
        for tensor in tensors(arguments):
            assert not tensor.is_inference()
        before = [tensor._version for tensor in tensors(arguments)]
        getattr(OPS, name)(*arguments)
        made_here = writing_calls()[name]
        getattr(OPS, name)(*made_here)  # inference tensors have no counter
    assert all(t._version > version for t, version in zip(tensors(arguments), before, strict=True))


def merges() -> dict[str, Callable[[Tensor, Tensor, Tensor, BitMask], Any]]:
    return {
        "effective_weight": lambda w, a, b, mask: fade_kernels.effective_weight(w, a, b, mask, out=w),
        "effective_weights": lambda w, a, b, mask: fade_kernels.effective_weights([w], [a], [b], [mask], [1], out=[w]),
        "scatter_masked_": lambda w, a, b, mask: fade_kernels.scatter_masked_(w, torch.ones(mask.count), mask),
        "accumulate_gradient_magnitude_": lambda w, a, b, mask: fade_kernels.accumulate_gradient_magnitude_(
            [w], [torch.ones_like(w)]
        ),
        "accumulate_linear_gradient_magnitude_": lambda w, a, b, mask: (
            fade_kernels.accumulate_linear_gradient_magnitude_(w, torch.ones(3, 4), torch.ones(3, 40))
        ),
    }


@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, False) for name in merges()), ("effective_weight", True), ("scatter_masked_", True)]
)
def test_backward_refuses_a_weight_that_was_written_to(name: str, compiled: bool) -> None:
    x, w, a, b = torch.randn(3, 40), torch.randn(4, 40), torch.randn(2, 40), torch.randn(4, 2)
    mask = BitMask.pack(torch.rand(4, 40) < 0.5)
    layers = {
        "ours": lambda x: fade_kernels.masked_lora_linear(x, w, None, a, b, mask),
        "torch's": lambda x: functional.linear(x, w),
    }
    merge = merges()[name]
    if compiled:
        torch.compiler.reset()
        merge = torch.compile(merge, backend="aot_eager")
    for layer in layers.values():
        y = layer(x.clone().requires_grad_())
        y.sum().backward(retain_graph=True)
        merge(w, a, b, mask)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# --- memory that is shared -------------------------------------------------------------------------------------------


def test_out_that_overlaps_the_weight_is_refused_unless_it_is_the_weight() -> None:
    memory = torch.randn(6 * 40)
    w, a, b = memory[: 4 * 40].view(4, 40), torch.randn(2, 40), torch.randn(4, 2)
    mask = BitMask.pack(torch.rand(4, 40) < 0.5)
    expected = w + torch.where(mask.unpack(), b @ a, 0.0)
    overlapping = memory[40 : 5 * 40].view(4, 40)
    with pytest.raises(ValueError, match="out shares memory with weight"):
        fade_kernels.effective_weight(w, a, b, mask, out=overlapping)
    with pytest.raises(ValueError, match="layer 0: out shares memory with the weight of layer 0"):
        fade_kernels.effective_weights([w], [a], [b], [mask], [1.0], out=[overlapping])
    with pytest.raises(ValueError, match="layer 0: out shares memory with the out of layer 1"):
        fade_kernels.effective_weights([w, w], [a, a], [b, b], [mask, mask], [1.0, 1.0], out=[w, w])
    with pytest.raises(ValueError, match="layer 1: out shares memory with the weight of layer 0"):
        fade_kernels.effective_weights([w, w], [a, a], [b, b], [mask, mask], [1.0, 1.0], out=[torch.empty(4, 40), w])
    square = torch.randn(4, 4)
    with pytest.raises(ValueError, match="out shares memory with weight"):
        fade_kernels.effective_weight(square, a[:, :4], b, BitMask.full((4, 4)), out=square.t())
    with pytest.raises(ValueError, match="out shares memory with lora_b"):
        fade_kernels.effective_weight(torch.randn(4, 2), a[:, :2], b, BitMask.full((4, 2)), out=b)
    merged = fade_kernels.effective_weight(w, a, b, mask, out=w)
    torch.testing.assert_close(merged, expected)


def test_accumulators_that_share_memory_are_refused() -> None:
    memory = torch.zeros(6, 8)
    ones = torch.ones(6, 8)
    for first, second in ((memory, memory[:]), (memory[:4], memory[2:]), (memory[:, :5], memory[:, 3:])):
        gradients = [torch.ones(first.shape), torch.ones(second.shape)]
        with pytest.raises(ValueError, match=r"saliency\[0\] and saliency\[1\] share memory"):
            fade_kernels.accumulate_gradient_magnitude_([first, second], gradients)
    with pytest.raises(ValueError, match=r"saliency\[0\] and gradient\[0\] share memory"):
        fade_kernels.accumulate_gradient_magnitude_([memory[:4]], [memory[2:]])
    assert not memory.any()
    fade_kernels.accumulate_gradient_magnitude_([memory[:, ::2], memory[:, 1::2]], [ones[:, :4], 2 * ones[:, :4]])
    assert torch.equal(memory, torch.tensor([1.0, 2.0]).repeat(6, 4))
    fade_kernels.accumulate_gradient_magnitude_([memory[:, :4], memory[:, 4:]], [ones[:, :4], ones[:, :4]])
    assert torch.equal(memory, torch.tensor([2.0, 3.0]).repeat(6, 4))


# --- what comes between forward and backward -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_saved_tensors_may_be_recomputed(name: str, problem: Problem) -> None:
    """Checkpointing recomputes a forward pass while a backward pass unpacks what it saved; offloading moves it."""
    leaves = [leaf.requires_grad_() for leaf in problem.leaves(name)]
    function = problem.function(name)
    expected = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves)

    def twice(*leaves: Tensor) -> Tensor:
        return function(*[leaf * 1.0 for leaf in leaves]).pow(3).sum()

    for reentrant in (False, True):
        actual = checkpoint(twice, *leaves, use_reentrant=reentrant)
        for leaf in leaves:
            leaf.grad = None
        actual.backward()
        close([leaf.grad for leaf in leaves], expected)
    with torch.autograd.graph.save_on_cpu():
        actual = twice(*leaves)
    close(torch.autograd.grad(actual, leaves), expected)


# --- work on the host ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "values", "convolution"])
def test_arguments_are_checked_once_for_each_signature(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again for every other: a check that is left out must not be one that would have failed."""
    problem = Problem(3)
    leaves, function = problem.leaves(name), problem.function(name)
    checks = []
    for module in (define_linear, define_conv2d):
        monkeypatch.setattr(module, "check_scale", lambda *args: checks.append(args))
    function(*leaves)
    first = len(checks)
    for _ in range(3):
        function(*(leaf.clone() for leaf in leaves))
    assert len(checks) == first
    larger = torch.cat([leaves[0], leaves[0]])
    function(larger, *leaves[1:])
    assert len(checks) == first + 1
    with pytest.raises(TypeError, match="dtypes must agree"):
        function(leaves[0].float(), *leaves[1:])
    with pytest.raises(TypeError, match="dtypes must agree"):  # what has failed is not remembered as right
        function(leaves[0].float(), *leaves[1:])


def test_a_layer_is_one_node_and_one_operator_a_direction(problem: Problem) -> None:
    leaves, scale = [leaf.requires_grad_() for leaf in problem.leaves("linear")], torch.tensor(SCALE)

    def layer() -> Tensor:
        x, a, b = leaves
        return fade_kernels.masked_lora_linear(x, problem.weight, problem.bias, a, b, problem.mask, scale)

    with Operators() as forward:
        y = layer()
    assert forward.names == ["masked_lora_linear"]
    assert y.grad_fn.name() == "masked_lora_linearBackward"
    assert {type(parent).__name__ for parent, _ in y.grad_fn.next_functions if parent} == {"AccumulateGrad"}
    with Operators() as backward:
        torch.autograd.grad(y, leaves, torch.ones(y.shape, dtype=y.dtype))
    ours = [name for name in backward.names if name.startswith("masked_lora_linear")]
    assert 1 <= len(ours) <= 2
    assert set(backward.names) <= {*ours, "ones", "detach"}
    with torch.no_grad(), Operators() as inference:
        assert layer().grad_fn is None
    assert inference.names == ["masked_lora_linear"]


class Operators(TorchDispatchMode):
    """Names of the operators that run, of torch's own too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_whoever_watches_sees_the_operators(problem: Problem, name: str) -> None:
    """Compositions are called past the dispatcher, but not where a mode or a profiler asks what runs."""
    operator = {"linear": "masked_lora_linear", "convolution": "masked_lora_conv2d"}[name]
    leaves = [leaf.requires_grad_() for leaf in problem.leaves(name)]
    call = problem.function(name)

    def step() -> list[Tensor]:
        return [y := call(*leaves), *torch.autograd.grad(y.sum(), leaves)]

    alone = step()
    with Operators() as ran:
        watched = step()
    assert ran.names.count(operator) == 1
    assert any(gradient.startswith(operator) and gradient != operator for gradient in ran.names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        profiled = step()
    assert f"fade_kernels::{operator}" in {event.name for event in profiler.events()}
    for other in (watched, profiled):
        assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))


def test_a_number_as_scale_costs_no_tensor_a_call(problem: Problem) -> None:
    x, a, b = problem.leaves("linear")
    call = problem.function("linear")
    call(x, a, b)
    with Operators() as ran:
        made_in_a_trace = call(x, a, b)
    made = []
    original = torch.tensor
    torch.tensor = lambda *args, **kwargs: made.append(args) or original(*args, **kwargs)
    try:
        again = call(x, a, b)
    finally:
        torch.tensor = original
    assert not made
    assert torch.equal(again, made_in_a_trace)
    assert "masked_lora_linear" in ran.names
    with torch.inference_mode():
        fade_kernels.masked_lora_linear(x, None, None, a, b, problem.mask, 0.123)
    fade_kernels.masked_lora_linear(x.requires_grad_(), None, None, a, b, problem.mask, 0.123).sum().backward()
