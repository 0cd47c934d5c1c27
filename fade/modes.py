"""The modes PyTorch can be in when somebody calls, and the state of a model's modules: put to what training needs, and
back to what they were afterwards."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def plain_mode() -> Iterator[None]:
    """Gradients on; no inference mode, autocast, compiled code, default device or default dtype but PyTorch's own, and
    no attention by cuDNN, whose gradients can be wrong, up to NaN.

    So that what runs inside gives the same result from within any of them. The default dtype, whether compiled code
    runs and what attention is computed with are the process's, all else the thread's.
    """
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        modes.enter_context(_of_the_process())
        yield


_guard = threading.Lock()
_inside = 0
_before = contextlib.ExitStack()


@contextlib.contextmanager
def _of_the_process() -> Iterator[None]:
    """What belongs to the process: the first thread to come in changes it, the last to go puts it back."""
    global _inside
    with _guard:
        if not _inside:
            _before.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
            # Compiled code calls no hooks that were added to it, and each part of a run would have to compile it anew.
            _before.enter_context(torch.compiler.set_stance("force_eager"))
            # PyTorch prefers cuDNN's on Hopper, and (2.11, cuDNN 9.19) plans its backward pass for the strides that the
            # output's gradient had in the first call of a shape: those of others come out wrong, up to NaN. FLUX.1's
            # two kinds of blocks differ so. Other faults of it: pytorch/pytorch#196678, NVIDIA/cudnn-frontend#1072.
            _before.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
            torch.backends.cuda.enable_cudnn_sdp(False)
        _inside += 1
    try:
        yield
    finally:
        with _guard:
            _inside -= 1
            if not _inside:
                _before.close()


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """The module and all within it in evaluation mode; each of them as it was afterwards.

    Modules that were put in meanwhile are then in the mode of the whole.
    """
    training = {inner: inner.training for inner in module.modules()}
    module.eval()
    try:
        yield
    finally:
        module.train(training[module])
        for inner, mode in training.items():
            inner.training = mode


def out_of_inference_mode(module: nn.Module) -> None:
    """Replaces weights and buffers that were made under inference_mode, through which no gradient passes, by ordinary
    ones of the same bits. Those shared between modules stay shared. Packed weights are left: a copy would be without
    what their library keeps beside them."""
    replaced: dict[int, Tensor] = {}

    def ordinary(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            with torch.no_grad():
                copy = tensor.clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            replaced[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
        return replaced[id(tensor)]

    for inner in module.modules():
        for tensors in (inner._parameters, inner._buffers):
            for name, tensor in tensors.items():
                if type(tensor) in (Tensor, nn.Parameter) and tensor.is_inference():
                    tensors[name] = ordinary(tensor)
