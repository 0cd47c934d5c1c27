"""`python -m fade_kernels.compile_report`: compiles every kernel that ships for GPUs that need not be there.

Triton kernels are compiled case by case (`compile_cases()` of each module in `triton_kernels/`), the CUDA sources with
nvcc where it and they are present. For each case and architecture the report has registers, spilled bytes, shared
memory and tensor-core instructions; it fails where a case does not compile, exceeds the chip's shared memory, lacks the
tensor-core instructions it must have, or spills on sm_90. There it also fails where a loop of matrix products is not
pipelined: where it loads from memory what was not copied to shared memory steps before, or waits for the product it has
just begun. What may do so all the same, a case names with the reason (`CompileCase.allowed`).
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fade_kernels.triton_kernels.launch import Allowance, CompileCase

ARCHITECTURES = (80, 90, 100)

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one block may have, by architecture."""

MATRIX_INSTRUCTION = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma)\.(?:sync|cta_group|sp)\b")
"""Matrix instructions in PTX: mma (sm_80), wgmma (sm_90), tcgen05 (sm_100)."""

WGMMA = re.compile(r"wgmma\.mma_async\.sync\.[^;]*?\}\s*,\s*(\{|%)")
"""A wgmma with what opens its left operand: a list of registers, or the register that holds a descriptor."""

LOAD = re.compile(r"\btt\.load\b")
PRODUCT = re.compile(r"\b(?:ttng\.warp_group_dot|tt\.dot)\b")
WAITED_FOR = re.compile(
    r"\bttng\.warp_group_dot_wait\b.*pendings = 0\b|\bttng\.warp_group_dot\b(?!.*isAsync = true)|\btt\.dot\b"
)
"""In Triton's GPU IR: a load that the pipeliner left as it was; a matrix product; a wait until no product is under way,
or a product that is waited for where it stands."""

RESOURCES = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")

CUDA_SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
"""Present in a checkout, absent from an installed package."""


@dataclass
class Row:
    """One kernel configuration compiled for one architecture; None where it could not be found out."""

    kernel: str
    configuration: str
    architecture: str
    registers: int | None = None
    spill_bytes: int | None = None
    """Stack and local memory of a thread."""
    shared_bytes: int | None = None
    tensor_core: int | None = None
    """Matrix instructions in the code; None: not counted."""
    register_form: int | None = None
    """Those of them, on sm_90, that take their left operand from registers: an operand made in the kernel."""
    loads: int | None = None
    """Loads in loops of matrix products that are not pipelined, on sm_90."""
    waits: int | None = None
    """Waits for a product that has just begun in such a loop, on sm_90."""
    violations: list[str] = field(default_factory=list)


def check(row: Row, arch: int, tensor_cores: bool, allowed: "Sequence[Allowance]" = ()) -> None:
    """Adds to the row's violations what is over a limit or missing."""
    limit = SHARED_LIMIT.get(arch)
    if row.shared_bytes is not None and limit is not None and row.shared_bytes > limit:
        row.violations.append(f"needs {row.shared_bytes} bytes of shared memory, {row.architecture} has {limit}")
    may_spill = sum(allowance.count for allowance in allowed if allowance.kind == "spill")
    if arch == 90 and row.spill_bytes and row.spill_bytes > may_spill:
        row.violations.append(f"spills {row.spill_bytes} bytes, {may_spill} are allowed")
    if tensor_cores and not row.tensor_core:
        row.violations.append("has no wgmma instructions" if arch == 90 else "has no tensor-core instructions")
    for kind, found in (("load", row.loads), ("wait", row.waits)):
        most = sum(allowance.count for allowance in allowed if allowance.kind == kind)
        if found is not None and found > most:
            row.violations.append(f"{found} {kind}s in loops of matrix products are not pipelined, {most} are allowed")


# --- Triton ----------------------------------------------------------------------------------------------------------


def triton_modules() -> list[str]:
    """Names of all modules of `triton_kernels`."""
    import fade_kernels.triton_kernels as package

    return [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]


def cases_of(module: str) -> "list[CompileCase]":
    """The compile cases of a module; none where it has no kernels of its own."""
    make = getattr(importlib.import_module(module), "compile_cases", None)
    return [] if make is None else make()


def configuration(case: "CompileCase") -> str:
    """A case's element type and tiling, e.g. "bf16 BT128 BN64 BK64 w4 s3"."""
    blocks = " ".join(f"{name}{size}" for name, size in case.tiling.blocks.items())
    return f"{case.dtype} {blocks} w{case.tiling.num_warps} s{case.tiling.num_stages}"


def count_matrix_instructions(ptx: str, arch: int) -> tuple[int, int | None]:
    """Matrix instructions in PTX, and for sm_90 how many wgmma take their left operand from registers.

    On sm_90 only wgmma counts: the mma of older chips runs there at about half the speed.
    """
    if arch == 90:
        left_operands = WGMMA.findall(ptx)
        return len(left_operands), left_operands.count("{")
    return len(MATRIX_INSTRUCTION.findall(ptx)), None


def unpipelined(ttgir: str) -> tuple[int, int]:
    """Loads, and waits for a product that has just begun, in the loops of matrix products of Triton's GPU IR.

    A loop is what its own body does; loops within it count by themselves.
    """
    loads = waits = 0
    stack: list[tuple[int, list[str]]] = []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if stack and indent == stack[-1][0] and line.lstrip().startswith("}"):
            body = stack.pop()[1]
            if any(PRODUCT.search(inner) for inner in body):
                loads += sum(LOAD.search(inner) is not None for inner in body)
                waits += sum(WAITED_FOR.search(inner) is not None for inner in body)
        elif "scf.for " in line or "scf.while " in line:
            stack.append((indent, []))
        elif stack:
            stack[-1][1].append(line)
    return loads, waits


def resource_usage(cuobjdump_output: str) -> tuple[int, int]:
    """Registers and spilled bytes (stack and local) from `cuobjdump --dump-resource-usage`.

    Raises:
        ValueError: the output has no such line.
    """
    match = RESOURCES.search(cuobjdump_output)
    if match is None:
        raise ValueError(f"cuobjdump says nothing about registers: {cuobjdump_output.strip()[:200]!r}")
    registers, stack, _, local = map(int, match.groups())
    return registers, stack + local


def _cuobjdump() -> str | None:
    """Triton's own cuobjdump, or the toolkit's; None where there is neither."""
    import triton
    from triton import knobs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return knobs.nvidia.cuobjdump.path
        except (AttributeError, RuntimeError):
            bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.is_file() else shutil.which("cuobjdump")


def compile_triton_case(case: "CompileCase", arch: int) -> Row:
    """Compiles one case for sm_<arch>; what goes wrong is a violation of its row."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    row = Row(case.name, configuration(case), f"sm_{arch}")
    arguments = list(case.signature)
    aligned = [
        i for i, name in enumerate(arguments) if case.signature[name].startswith("*") or name in case.divisible_by_16
    ]
    try:
        source = ASTSource(
            fn=case.kernel,
            signature=dict(case.signature),
            constexprs={(arguments.index(name),): value for name, value in case.constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        options = {"num_warps": case.tiling.num_warps, "num_stages": case.tiling.num_stages}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        row.shared_bytes = compiled.metadata.shared
        row.tensor_core, row.register_form = count_matrix_instructions(compiled.asm["ptx"], arch)
        if arch == 90:
            row.loads, row.waits = unpipelined(compiled.asm["ttgir"])
            if not case.tensor_cores:
                row.waits = None  # products in plain arithmetic take their time where they stand
        if (tool := _cuobjdump()) is not None:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernel.cubin"
                cubin.write_bytes(compiled.asm["cubin"])
                command = [tool, "--dump-resource-usage", str(cubin)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            row.registers, row.spill_bytes = resource_usage(output)
        elif hasattr(compiled.metadata, "n_regs"):
            row.registers, row.spill_bytes = compiled.metadata.n_regs, compiled.metadata.n_spills
    # Whatever Triton raises (its own errors, ptxas, an assertion of the compiler) has the same consequence.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        row.violations.append(f"does not compile: {type(error).__name__}: {' '.join(lines[-3:])[:400]}")
        return row
    check(row, arch, case.tensor_cores, case.allowed)
    return row


def _compile_triton_index(module: str, index: int, arch: int) -> list[Row]:
    """One case, named by where it is: kernels cannot be sent to another process."""
    return [compile_triton_case(cases_of(module)[index], arch)]


# --- CUDA C++ --------------------------------------------------------------------------------------------------------


def parse_ptxas(log: str) -> Iterator[tuple[str, int, int, int]]:
    """Mangled name, registers, stack and spilled bytes, static shared bytes of every entry in a log of `ptxas -v`."""
    for entry in re.split(r"(?=ptxas info\s*: Compiling entry function)", log):
        name = re.search(r"Compiling entry function '(\w+)'", entry)
        used = re.search(r"Used (\d+) registers", entry)
        if name is None or used is None:
            continue
        stack = re.search(r"(\d+) bytes stack frame", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        yield name[1], int(used[1]), int(stack[1]) if stack else 0, int(shared[1]) if shared else 0


def find_nvcc() -> str | None:
    """nvcc on the PATH, in $CUDA_HOME or in /usr/local/cuda."""
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))


def short_name(signature: str) -> str:
    """A demangled signature without return type, arguments and anonymous namespaces: what fits a table."""
    name = signature.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for i in range(len(name) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(name[i], 0)
        if depth == 0:
            return name[:i] if name[i] == "(" else name
    return name


def _demangle(name: str) -> str:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return name
    return short_name(subprocess.run([tool, name], capture_output=True, text=True).stdout.strip() or name)


def compile_cuda_file(path: Path, arch: int) -> list[Row]:
    """Compiles the kernels of one .cu file for sm_<arch>: a row for each, or one with what nvcc said.

    Only the device's half is made: the host's says nothing about registers and takes most of the time.
    """
    from torch.utils.cpp_extension import include_paths

    source = path.name
    with tempfile.TemporaryDirectory() as folder:
        command = [
            find_nvcc() or "nvcc", "-cubin", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
            *(f"-I{include}" for include in (path.parent.parent, *include_paths())),
            str(path), "-o", str(Path(folder) / "kernels.cubin"),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if "error" in line.lower()] or [result.stderr[-300:]]
        return [Row(source, "nvcc", f"sm_{arch}", violations=[f"does not compile: {' '.join(errors[:3])[:400]}"])]
    rows = []
    for name, registers, stack, shared in parse_ptxas(result.stderr):
        row = Row(_demangle(name), source, f"sm_{arch}", registers, stack, shared)
        check(row, arch, tensor_cores=False)
        rows.append(row)
    return rows


# --- report ----------------------------------------------------------------------------------------------------------


def _run(jobs: list[tuple[Any, ...]], workers: int) -> Iterator[list[Row]]:
    """Results of (function, *arguments), in the order in which they are finished."""
    if workers == 1:
        for function, *arguments in jobs:
            yield function(*arguments)
        return
    # Fresh processes: forking one that runs torch's threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures: list[Future[list[Row]]] = [pool.submit(*job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()


def compile_all(
    architectures: Sequence[int] = ARCHITECTURES,
    *,
    kernel: str = "",
    workers: int = 1,
    one_of_each: Sequence[int] = (),
    cuda: bool = True,
) -> list[Row]:
    """Compiles the cases of every kernel, and the CUDA sources where nvcc is present.

    Args:
        architectures: chips to compile for, e.g. 90 for sm_90.
        kernel: only kernels, modules and files whose name contains this.
        workers: processes.
        one_of_each: chips for which only the first case of each kernel is compiled, to save time.
        cuda: whether to compile the CUDA sources too.
    """
    rows: list[Row] = []
    jobs: list[tuple[Any, ...]] = []
    for module in triton_modules():
        try:
            cases = cases_of(module)
        # A module that cannot even be imported is a kernel that cannot be used.
        except Exception as error:
            reason = f"cannot be imported: {type(error).__name__}: {error}"
            rows.append(Row(module.rsplit(".", 1)[-1], "", "", violations=[reason]))
            continue
        seen: set[str] = set()
        for i, case in enumerate(cases):
            first = case.kernel.__name__ not in seen
            if kernel not in case.name and kernel not in module:
                continue
            seen.add(case.kernel.__name__)
            chips = (*architectures, *(one_of_each if first else ()))
            jobs += [(_compile_triton_index, module, i, arch) for arch in chips]
    if cuda and find_nvcc():
        files = [path for path in sorted(CUDA_SOURCES.glob("*.cu")) if kernel in path.name]
        jobs += [(compile_cuda_file, path, arch) for path in files for arch in (*architectures, *one_of_each)]
    for done, result in enumerate(_run(jobs, min(workers, max(len(jobs), 1))), start=1):
        rows += result
        if sys.stderr.isatty():
            print(f"\r{done} of {len(jobs)} compiled", end="" if done < len(jobs) else "\n", file=sys.stderr)
    return sorted(rows, key=lambda row: (row.kernel, row.configuration, int(row.architecture[3:] or 0)))


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text in aligned columns."""
    titles = ("kernel", "configuration", "chip", "regs", "spill", "shared", "loads", "waits", "matrix", "reg. form", "")
    cells = [titles] + [
        (
            row.kernel,
            row.configuration,
            row.architecture,
            *(
                "-" if value is None else str(value)
                for value in (
                    *(row.registers, row.spill_bytes, row.shared_bytes),
                    *(row.loads, row.waits, row.tensor_core, row.register_form),
                )
            ),
            "FAILS" if row.violations else "",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(titles))]
    lines = []
    for line in cells:
        text = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        lines.append("  ".join(text + numbers).rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if every case keeps the limits, 1 if not, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m fade_kernels.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--arch", type=int, action="append", metavar="N", help="80, 90, 100: repeat for several; all")
    parser.add_argument("--kernel", default="", metavar="SUBSTRING", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one per core)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {options.jobs}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 makes Triton interpret its kernels: unset it to compile them")
    try:
        import triton  # noqa: F401
    except ImportError:
        parser.error("Triton is not installed: pip install triton (Linux)")
    rows = compile_all(tuple(options.arch or ARCHITECTURES), kernel=options.kernel, workers=options.jobs)
    if not rows:
        parser.error(f"no kernel's name contains {options.kernel!r}")
    print(format_table(rows))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if not find_nvcc():
        print("nvcc not found: the CUDA sources were not compiled", file=sys.stderr)
    failed = [row for row in rows if row.violations]
    for row in failed:
        where = ", ".join(part for part in (row.kernel, row.configuration, row.architecture) if part)
        print(f"violation: {where}: {'; '.join(row.violations)}", file=sys.stderr)
    print(f"{len(rows)} compiled, {len(failed)} over a limit", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
