"""What the launchers of the masked-LoRA linear's forward and input gradient share: arguments, precisions, ranks.

Both kernels walk the tiles of their contraction in the order of the mask's `TileOrder`: those that hold any bit first,
with both terms in each step, then the others with the term of W alone. Neither loop has a branch, which would keep the
loads behind it out of the pipeline and make its products wait. Where nearly all tiles hold a bit, they are walked as
they are, without a list.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fade_kernels.mask_facts import tile_order
from fade_kernels.triton_kernels.launch import (
    TRITON_DTYPES,
    Allowance,
    CompileCase,
    Launch,
    Tiling,
    as_scale,
    ceil_div,
    kept,
    on_device,
    power_of_2_from,
)
from fade_kernels.triton_kernels.tuning import Problem, choose_tiling

GROUP_T = 16
"""Tiles of T per strip before the next strip: 16 x 128 rows of x stay in a 60 MB L2 up to 14000 channels in 16 bits."""

RANK_STEP = 16
"""Ranks at a time without tensor cores, where a dot is unrolled; also the least that tl.dot takes."""

MAX_RANK = 128

LARGE = 4_000_000
"""Weights from which on the two terms are better summed apart: each in a larger tile than both have together."""

ROOM = 150 * 1024
"""Bytes of shared memory that a block of theirs takes: sm_80, sm_90 and sm_100 have them, not sm_86, sm_89, sm_120."""

MaskForm = Literal["full", "mixed", "sparse"]
"""What a launch knows of the mask's tiles."""


def with_unit_stride(matrix: Tensor) -> Tensor:
    """The matrix itself if the elements of a row follow each other, else a contiguous copy."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


def _unit_stride(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else with_unit_stride(matrix)


def as_factors(lora_a: Tensor, lora_b: Tensor, along: str) -> tuple[Tensor, Tensor]:
    """Both factors in one dtype, with unit stride; factors of two dtypes become fp32.

    So do 16-bit ones along N where rows of B do not start and end at multiples of 16: the input gradient copies B to
    shared memory, 4 bytes at a time at least.
    """
    uneven = along == "n" and lora_b.dtype.itemsize == 2 and (lora_b.shape[1] % 16 or lora_b.stride(0) % 16)
    if lora_a.dtype != lora_b.dtype or uneven:
        lora_a, lora_b = lora_a.float(), lora_b.float()
    return with_unit_stride(lora_a), with_unit_stride(lora_b)


def check_arguments(rank: int, input_precision: str, **matrices: Tensor | None) -> None:
    """Raises TypeError for an element type the kernels do not take, ValueError for a rank or precision they do not."""
    for name, tensor in matrices.items():
        if tensor is not None and tensor.dtype not in TRITON_DTYPES:
            raise TypeError(f"{name} must be float32, float16 or bfloat16 for the Triton kernels, not {tensor.dtype}")
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the Triton kernels take ranks from 1 to {MAX_RANK}, not {rank}")
    if input_precision not in ("ieee", "tf32"):
        raise ValueError(f"input_precision must be 'ieee' or 'tf32', not {input_precision!r}")


def precision_constants(dtype: torch.dtype, rank: int, input_precision: str) -> dict[str, Any]:
    """The compile-time arguments that say how the factors' product and the two terms are computed.

    The product of the factors is a dot in the factors' own dtype, not in that of the activations: fp32 factors beside
    fp16 activations would lose to its subnormals what training has just begun to write into B. In TF32 the error of
    x Delta^T stays what the rounding of Delta to 16 bits makes it, 2^-9 or 2^-12 per element.
    """
    ieee = dtype == torch.float32 and input_precision == "ieee"
    padded = max(RANK_STEP, power_of_2_from(rank))
    return {
        "BR": RANK_STEP if ieee else padded,
        "RANK_STEPS": ieee and padded > RANK_STEP,
        "INPUT_PRECISION": "ieee" if ieee else "tf32",
    }


def check_output(name: str, output: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Raises unless a kernel can write `output`: [T, C] of the activations' dtype or fp32, rows without gaps inside."""
    if tuple(output.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(output.shape)}")
    if output.dtype not in (dtype, torch.float32):
        raise TypeError(f"{name} must be {dtype} like the rows, or float32, not {output.dtype}")
    if output.stride(-1) != 1 and output.shape[-1] > 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, not {output.stride(-1)}")


def precision_name(dtype: torch.dtype, input_precision: str) -> str:
    """Element type and precision in one word: "fp32", "tf32", "fp16" or "bf16"."""
    return "tf32" if dtype == torch.float32 and input_precision == "tf32" else TRITON_DTYPES[dtype]


def _has_room(device: torch.device) -> bool:
    """Whether a block may have the shared memory that the largest tiles need; without a device, as an H100."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= ROOM


class _Arguments(NamedTuple):
    """What a launch gets, as its kernel takes it."""

    out: Tensor
    rows: Tensor
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    mask_words: Tensor
    scale: Tensor | float
    input_precision: str


class _Plan(NamedTuple):
    """A launch, and the tile of the `TileOrder` that it walks; None: all tiles as they are."""

    launch: Launch
    tile: tuple[int, int] | None


class Ready(NamedTuple):
    """A launch with the list of tiles of one mask, for whoever calls again with arguments alike: same sizes, strides
    and types, nothing to be copied or converted first."""

    launch: Launch
    order: tuple[Tensor, Tensor] | None
    columns: int
    has_bias: bool
    """Whether the kernel takes a bias."""

    def __call__(
        self,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        mask_words: Tensor,
        scale: Tensor,
    ) -> Tensor:
        out = rows.new_empty((rows.shape[0], self.columns))
        order = self.order or (mask_words, mask_words)
        weight = rows if weight is None else weight  # pointers of absent arguments are never read
        terms = (weight, rows if bias is None else bias) if self.has_bias else (weight,)
        with on_device(rows):
            self.launch(rows, *terms, lora_a, lora_b, mask_words, as_scale(scale), *order, out)
        return out


class LinearKernel:
    """One of the two kernels: what differs between them, and the launches that it has made."""

    def __init__(
        self,
        kernel: Any,
        along: str,
        candidate_tilings: Callable[[torch.dtype, int, str], tuple[Tiling, ...]],
        default_tiling: Callable[..., Tiling],
    ) -> None:
        """For a kernel that sums over "k" (forward) or "n" (input gradient), and the choice of its tiling."""
        self._kernel = kernel
        self._name = kernel.__name__.removesuffix("_kernel")
        self._along = along
        self._candidate_tilings = candidate_tilings
        self._default_tiling = default_tiling
        self._plans: dict[Hashable, _Plan] = {}

    def __call__(
        self,
        out: Tensor | None,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        mask_words: Tensor,
        scale: Tensor,
        tiling: Tiling | None,
        input_precision: str,
        form: MaskForm,
    ) -> Tensor:
        """out = rows W^T + rows Delta^T + bias, or rows W + rows Delta. Arguments: those of the two modules.

        Raises:
            TypeError, ValueError: element types, ranks, precisions and outputs that the kernel does not take.
        """
        if out is None:
            out = rows.new_empty((rows.shape[0], lora_b.shape[0] if self._along == "k" else lora_a.shape[1]))
        weight, bias = _unit_stride(weight), _unit_stride(bias)
        factors, words = as_factors(lora_a, lora_b, self._along), with_unit_stride(mask_words)
        scale_argument = as_scale(scale)
        arguments = _Arguments(
            out, with_unit_stride(rows), weight, bias, *factors, words, scale_argument, input_precision
        )
        with on_device(rows):
            plan = self._plan(arguments, tiling, form)
            if out.numel() > 0:
                self._launch(arguments, plan, tiling)
        return out

    def ready(
        self,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        mask_words: Tensor,
        scale: Tensor,
        input_precision: str,
        form: MaskForm,
    ) -> Ready | None:
        """What calls like this one need no more than launch; None where something must be made of the arguments first,
        or where the mask's tiles are asked for first while a graph is captured."""
        given = (rows, weight, bias, lora_a, lora_b, mask_words)
        taken = (*map(_unit_stride, given[:3]), *as_factors(lora_a, lora_b, self._along), with_unit_stride(mask_words))
        columns = lora_b.shape[0] if self._along == "k" else lora_a.shape[1]
        if 0 in (rows.shape[0], columns) or any(a is not b for a, b in zip(given, taken, strict=True)):
            return None
        out = rows.new_empty((rows.shape[0], columns))
        arguments = _Arguments(
            out, rows, weight, bias, lora_a, lora_b, mask_words, as_scale(scale), input_precision
        )  # fmt: skip
        with on_device(rows):
            plan, order = self._plan(arguments, None, form), None
            if plan.tile is not None:
                order = tile_order(mask_words, lora_a.shape[1], *plan.tile, along=self._along)
                if order is None:
                    return None
        return Ready(plan.launch, order, columns, self._along == "k")

    def _plan(self, arguments: _Arguments, tiling: Tiling | None, form: MaskForm) -> _Plan:
        """The launch for arguments of these types, sizes and strides."""
        if tiling is not None:
            return self._made(arguments, tiling, form)
        out, rows, weight, bias, lora_a, lora_b, mask_words, scale, input_precision = arguments
        key = (
            *(rows.shape, rows.stride(), rows.dtype),
            *(out.shape, out.stride(), out.dtype),
            None if weight is None else (weight.stride(), weight.dtype),
            None if bias is None else bias.dtype,
            *(lora_a.shape, lora_a.stride(), lora_a.dtype),
            *(lora_b.shape, lora_b.stride()),
            mask_words.stride(),
            *(scale.__class__ is float, input_precision, form),
        )
        return kept(self._plans, key, lambda: self._made(arguments, None, form))

    def _made(self, arguments: _Arguments, tiling: Tiling | None, form: MaskForm) -> _Plan:
        out, rows, weight, bias, lora_a, lora_b, mask_words, scale, input_precision = arguments
        (R, K), N, T = lora_a.shape, lora_b.shape[0], rows.shape[0]
        check_arguments(R, input_precision, rows=rows, weight=weight, lora_a=lora_a, lora_b=lora_b, out=out)
        forward = self._along == "k"
        check_output("out", out, (T, N if forward else K), rows.dtype)
        if tiling is None:
            tiling = self._default_tiling(rows.dtype, T, N, K, R, input_precision, form)
            if "APART" in tiling.blocks and not _has_room(rows.device):
                tiling = self._candidate_tilings(rows.dtype, R, input_precision)[0]
            candidates = self._candidate_tilings(rows.dtype, R, input_precision)

            def run(tiling: Tiling) -> None:
                self._launch(arguments, self._made(arguments, tiling, form), tiling)

            sizes = Problem(precision_name(rows.dtype, input_precision), T, N, K, R)
            tiling = choose_tiling(self._name, sizes, tiling, candidates, rows.device, run)
        tile = (tiling.blocks["BN"], tiling.blocks["BK"])
        tiles = ceil_div(T, tiling.blocks["BT"]) * ceil_div(out.shape[1], tile[0] if forward else tile[1])
        skip = form != "full" and (K if forward else N) > 0
        strides = (
            rows.stride(0),
            0 if weight is None else weight.stride(0),
            *(lora_a.stride(0), lora_b.stride(0), mask_words.stride(0), out.stride(0)),
        )
        constants = {
            **precision_constants(rows.dtype, R, input_precision),
            "GROUP_T": GROUP_T,
            "HAS_WEIGHT": weight is not None,
            **({"HAS_BIAS": bias is not None} if forward else {}),
            "SKIP": skip,
            "SCALE_POINTER": isinstance(scale, Tensor),
            "APART": tiling.blocks.get("APART", 0),
        }
        return _Plan(Launch(self._kernel, (tiles,), (T, N, K, R, *strides), constants, tiling), tile if skip else None)

    def _launch(self, arguments: _Arguments, plan: _Plan, tiling: Tiling | None) -> None:
        out, rows, weight, bias, lora_a, lora_b, mask_words, scale, _ = arguments
        order: tuple[Tensor, Tensor] = (mask_words, mask_words)  # pointers of absent arguments are never read
        if plan.tile is not None:
            listed = tile_order(mask_words, lora_a.shape[1], *plan.tile, along=self._along)
            if listed is None:  # not known, and not to be found while a graph is captured
                plan = self._plan(arguments, tiling, "full")
            else:
                order = listed
        weight = rows if weight is None else weight
        if self._along == "k":
            plan.launch(rows, weight, rows if bias is None else bias, lora_a, lora_b, mask_words, scale, *order, out)
        else:
            plan.launch(rows, weight, lora_a, lora_b, mask_words, scale, *order, out)


def allowances(skip: bool, rank_steps: bool, has_weight: bool, apart: bool) -> tuple[Allowance, ...]:
    """What the loops of both kernels hold although it is not pipelined, and what does not fit into registers."""
    allowed = [Allowance("wait", 1, "the factors' product, R deep, is what Delta is made of in the same step")]
    if skip:
        loops = 1 + has_weight
        allowed.append(Allowance("load", loops, "the next tile's number, one step ahead of the copies of that tile"))
    if apart and not skip:
        reason = (
            "a few addresses, by Triton 3.9; by 3.6, where it was measured, all fits. A third faster for dX of large "
            "layers than the tiling that fits"
        )
        allowed.append(Allowance("spill", 48, reason))
    if rank_steps:
        reason = (
            "fp32 without tensor cores, ranks above 16: the loop over ranks keeps the one around it from a pipeline"
        )
        allowed.append(Allowance("load", 4 if has_weight else 3, reason))
    return tuple(allowed)


def compile_cases_of(
    kernel: Any,
    name: str,
    pointers: Sequence[str],
    integers: Sequence[str],
    divisible: Sequence[str],
    candidates: Callable[[torch.dtype, int, str], tuple[Tiling, ...]],
    flags: Mapping[str, bool],
) -> list[CompileCase]:
    """The forms of a masked-LoRA kernel that ship: dtypes x tilings x ranks, with and without a list of tiles.

    fp16 compiles to the same code as bf16 but for the instruction's name: one form stands for all.
    """
    dtypes = {name: dtype for dtype, name in TRITON_DTYPES.items()}
    cases = []

    def add(dtype: str, rank: int, factors: str, form: str) -> None:
        even = divisible if rank % 16 == 0 else [name for name in divisible if name not in ("R", "stride_b")]
        element = "fp32" if dtype == "tf32" else dtype
        precision = "tf32" if dtype == "tf32" else "ieee"
        for tiling in candidates(dtypes[element], rank, precision):
            constants = {
                **tiling.blocks,
                **precision_constants(dtypes[element], rank, precision),
                **flags,
                "GROUP_T": GROUP_T,
                "HAS_WEIGHT": form != "delta alone",
                "SKIP": form != "full mask",
                "SCALE_POINTER": True,
                "APART": tiling.blocks.get("APART", 0),
            }
            signature = {
                **{pointer: f"*{element}" for pointer in pointers},
                **dict.fromkeys(("lora_a", "lora_b"), f"*{factors}"),
                **dict.fromkeys(("mask_words", "order", "counts"), "*i32"),
                "scale": "*fp32",
                **dict.fromkeys(integers, "i32"),
            }
            ordered = {
                argument: "constexpr" if argument in constants else signature[argument] for argument in kernel.arg_names
            }
            cases.append(
                CompileCase(
                    name=f"{name}, {form}, r = {rank}, {factors} factors",
                    kernel=kernel,
                    dtype=dtype,
                    signature=ordered,
                    constants=constants,
                    tiling=tiling,
                    tensor_cores=dtype != "fp32",
                    divisible_by_16=tuple(even),
                    allowed=allowances(
                        constants["SKIP"], constants["RANK_STEPS"], constants["HAS_WEIGHT"], bool(constants["APART"])
                    ),
                )
            )

    for dtype in ("bf16", "tf32", "fp32"):
        own = "fp32" if dtype == "tf32" else dtype
        for rank in (16, 128):
            add(dtype, rank, own, "occupied tiles first")
            add(dtype, rank, own, "full mask")
    add("bf16", 16, "bf16", "delta alone")
    for rank in (4, 32, 128):
        add("bf16", rank, "fp32", "occupied tiles first")
    add("fp16", 16, "fp16", "occupied tiles first")
    return cases
