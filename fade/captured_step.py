"""The student's pass of one training step as a CUDA graph: recorded once, then replayed on other inputs.

A UNet launches thousands of kernels a step, and Python takes longer to launch them than a fast GPU to run them. A graph
launches them all at once. It does the same arithmetic on the same memory, so inputs are copied into the tensors that it
was recorded with, and what changes from step to step must be in memory and not in Python's numbers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fade import processes
from fade.backbones import Backbone
from fade.backbones.parts import is_managed
from fade.conditioning import Conditioning
from fade.training_mode import ResolvedMode

Record = Callable[[Callable[[], tuple[Tensor, ...]]], tuple[tuple[Tensor, ...], Callable[[], None]]]
"""Takes work without arguments; returns its outputs and what does the work again, into the same outputs."""

WARM_UP = 3
"""Passes before the recording, in which libraries choose and load their kernels."""


def why_not_captured(asked: str, backbone: Backbone, mode: ResolvedMode, prompts: Conditioning) -> str | None:
    """Why the student's pass is not recorded, as far as can be told before; None where it is tried."""
    if asked == "off":
        return "switched off"
    if processes.world() > 1:
        return "several processes train together, and what they exchange with uses the GPU from threads of its own"
    if backbone.device.type != "cuda":
        return f"the denoiser is on the {backbone.device.type}"
    if is_managed(backbone.denoiser):
        return "hooks or quantisation decide where the denoiser's weights are"
    if getattr(backbone.denoiser, "is_gradient_checkpointing", False):
        return "gradient checkpointing reads the random state in every pass"
    if any(not isinstance(rows, Tensor) for rows in prompts.values()):
        return "prompts keep their own lengths, so that no two steps have the same shapes"
    if mode.plan == "refilled":
        return "weights that each product rounds for itself take the step's number from Python"
    return None


def record_cuda_graph(work: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """A `Record` on the current CUDA device. Raises RuntimeError where the work cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return outputs, graph.replay


class CapturedStep:
    """Forward and backward pass of a loss: called with inputs, adds its gradients to those of the parameters.

        step = CapturedStep(lambda x, y: (F.mse_loss(model(x), y),), adapter.parameters(), (x, y))
        for x, y in batches:  # of the same shapes
            (loss,) = step(x, y)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    The gradients' memory is part of the graph, so they are set to zero between steps and not to None.
    """

    def __init__(
        self,
        losses: Callable[..., tuple[Tensor, ...]],
        parameters: Sequence[Tensor],
        inputs: Sequence[Tensor],
        record: Record = record_cuda_graph,
    ) -> None:
        """Records `losses(*inputs)`, of which the first is differentiated. Afterwards all gradients are zero.

        Raises RuntimeError where that is impossible; the gradients are then None.
        """
        self._inputs = [tensor.clone() for tensor in inputs]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

        def work() -> tuple[Tensor, ...]:
            found = losses(*self._inputs)
            gradients = torch.autograd.grad(found[0], parameters)
            torch._foreach_add_([parameter.grad for parameter in parameters], gradients)
            return tuple(loss.detach() for loss in found)

        try:
            self._outputs, self._replay = record(work)
        except BaseException:
            for parameter in parameters:
                parameter.grad = None
            raise
        torch._foreach_zero_([parameter.grad for parameter in parameters])

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The losses, in memory that the next call overwrites."""
        for static, given in zip(self._inputs, inputs, strict=True):
            if static.shape != given.shape:
                raise ValueError(f"recorded for an input {list(static.shape)}, called with {list(given.shape)}")
            static.copy_(given)
        self._replay()
        return self._outputs
