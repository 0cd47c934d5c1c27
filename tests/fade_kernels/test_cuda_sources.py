"""The CUDA library on a machine without a GPU: what nvcc makes of its sources, and what its kernels compute.

The kernels' own sources, compiled by g++ against cuda_emulation/cuda_runtime.h, must pass the checks that
`test_cuda.py` makes on a GPU. Then one line of each kernel is changed, and its check must fail.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_checks
import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).parent / "cuda_emulation"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
DEFINES = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
INCLUDES = [f"-I{ROOT / 'csrc'}", *(f"-I{path}" for path in cpp_extension.include_paths())]

NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
GXX = shutil.which(os.environ.get("CXX", "g++"))

# Shared memory of a block that needs no opt-in, and the registers at which 256 threads still fill half of a
# multiprocessor that holds 64 Ki of them. Shared memory lets two blocks of the others' in and no more.
MAX_SHARED_BYTES = 48 * 1024
MAX_REGISTERS = {"gather.cu": 128, "least_squares.cu": 128}


@pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH or in /usr/local/cuda/bin: nothing to compile with")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_for_every_architecture_without_spills(source: Path, tmp_path: Path) -> None:
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    flags = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-Wall", "-Xptxas", "-v", *DEFINES, *INCLUDES, *architectures]
    done = subprocess.run(
        [NVCC, *flags, "-c", str(source), "-o", str(tmp_path / "object.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    used = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", done.stderr)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", done.stderr)]
    kernels = len(re.findall(r"__global__", source.read_text()))
    assert len(used) >= 2 * kernels, done.stderr  # each kernel, or each of its instances, on both architectures
    assert len(spilled) == 3 * len(used)
    assert max(spilled, default=0) == 0, done.stderr
    assert max(used, default=0) <= MAX_REGISTERS.get(source.name, 64), done.stderr
    assert max(shared, default=0) <= MAX_SHARED_BYTES, done.stderr


# --- emulation -------------------------------------------------------------------------------------------------------

needs_gxx = pytest.mark.skipif(
    GXX is None or sys.platform != "linux", reason="the emulated CUDA library needs g++ on Linux"
)
CHECKS = {
    "accumulate": [
        cuda_checks.check_accumulate,
        cuda_checks.check_accumulate_alignment,
        cuda_checks.check_accumulate_strides,
        cuda_checks.check_accumulate_half_values,
    ],
    "bitmask": [
        cuda_checks.check_pack_mask,
        cuda_checks.check_unpack_mask,
        cuda_checks.check_mask_row_counts,
        cuda_checks.check_padding_bits,
        cuda_checks.check_mask_occupancy,
        cuda_checks.check_gather_scatter,
        cuda_checks.check_wrong_count,
    ],
    "gather": [
        cuda_checks.check_gathered_product,
        cuda_checks.check_gathered_layouts,
        cuda_checks.check_sampled_gradient,
        cuda_checks.check_sampled_factor_gradients,
    ],
    "least_squares": [
        cuda_checks.check_least_squares,
        cuda_checks.check_least_squares_of_some_rows,
        cuda_checks.check_least_squares_singular,
    ],
    "select": [cuda_checks.check_select, cuda_checks.check_select_layouts, cuda_checks.check_select_invalid],
}
SERVED = {
    "accumulate": ["accumulate_gradient_magnitude_"],
    "bitmask": ["pack_mask", "unpack_mask", "mask_row_counts", "mask_occupancy", "gather_masked", "scatter_masked_"],
    "gather": ["add_gathered_lora_", "add_gathered_values_", "sampled_gradient", "sampled_factor_gradients"],
    "least_squares": ["masked_least_squares_rows_"],
    "select": ["select_top_k"],
}


class Emulation:
    """Builds sources of csrc/cuda as CPU kernels of operators in a namespace of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libraries: list[torch.library.Library] = []
        sanitizers = "alignment,bounds,shift,signed-integer-overflow"
        self.flags = [
            *("-std=c++20", "-O1", "-w", "-fPIC", "-fvisibility=hidden"),
            *(f"-fsanitize={sanitizers}", "-fsanitize-undefined-trap-on-error"),
            *(*DEFINES, f"-I{EMULATION}", *INCLUDES),
        ]
        # What every source includes, compiled once.
        (folder / "prefix.h").write_text('#include "cuda/kernel.h"\n')
        self._run("-x", "c++-header", str(folder / "prefix.h"), "-o", str(folder / "prefix.h.gch"))
        self._run("-c", str(EMULATION / "shim.cpp"), "-o", str(folder / "shim.o"))
        (folder / "build_info.cpp").write_text((ROOT / "csrc" / "cuda" / "build_info.cu").read_text())
        self._run("-c", str(folder / "build_info.cpp"), "-o", str(folder / "build_info.o"))

    def _run(self, *arguments: str) -> None:
        done = subprocess.run([GXX, *self.flags, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def operators(self, name: str, change: tuple[str, str] | None = None) -> Any:
        """The operators that csrc/cuda/<name>.cu serves, with one piece of its text replaced."""
        namespace = f"fade_emulated_{len(self.libraries)}"
        text = (ROOT / "csrc" / "cuda" / f"{name}.cu").read_text()
        for before, after in [("(fade_kernels, CUDA, m)", f"({namespace}, CPU, m)"), *([change] if change else [])]:
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        # Memory that a launch sizes: as much as a block may ever have.
        text = re.sub(r"extern __shared__ (\w+ \w+)\[\];", r"static \1[kDynamicSharedBytes / 4];", text)
        source, library = self.folder / f"{namespace}.cpp", self.folder / f"{namespace}.so"
        source.write_text(text)
        torch_library = Path(torch.__file__).parent / "lib"
        self._run(
            *("-include", str(self.folder / "prefix.h"), "-shared", "-Wl,-Bsymbolic", str(source)),
            *(str(self.folder / "shim.o"), str(self.folder / "build_info.o"), "-o", str(library)),
            *(f"-L{torch_library}", "-ltorch_cpu", "-lc10"),
        )
        definitions = torch.library.Library(namespace, "DEF")
        for operator in SERVED[name]:
            schema = str(getattr(torch.ops.fade_kernels, operator).default._schema)
            definitions.define(schema.removeprefix("fade_kernels::"))
        self.libraries.append(definitions)
        torch.ops.load_library(str(library))
        return getattr(torch.ops, namespace)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return Emulation(tmp_path_factory.mktemp("emulation"))


@needs_gxx
@pytest.mark.parametrize("name", CHECKS)
def test_emulated_kernels(name: str, emulation: Emulation) -> None:
    operators = emulation.operators(name)
    for check in CHECKS[name]:
        check(operators, "cpu")


# Kernel: source, what is replaced, by what, the check that must notice.
MUTATIONS = {
    "accumulate, heads": ("accumulate", "i < head; i += kThreads", "i < 0; i += kThreads", 1),
    "accumulate, tails": ("accumulate", "int i = tail + threadIdx.x;", "int i = tail + 1 + threadIdx.x;", 0),
    "accumulate, layout": ("accumulate", "if (a.stride(d) != b.stride(d)) return false;", "", 2),
    "pack": ("bitmask", "if (lane == 0) words[i] = word;", "if (lane == 0) words[i] = word & ~2u;", 0),
    "unpack": ("bitmask", "(words[i] >> lane) & 1u;", "(words[i] >> (lane ^ 1)) & 1u;", 1),
    "count_rows": ("bitmask", "w = lane_index(); w < width;", "w = lane_index(); w < width - 1;", 2),
    "occupancy": ("bitmask", " & bit_range(low, high)", "", 4),
    "scan_rows": ("bitmask", "    counts[n] = before;", "    counts[n] = 0;", 5),
    "padding bits": ("bitmask", "w] & column_bits(w, columns));", "w]);", 3),
    "copy_masked": ("bitmask", "__popc(word & lower_lanes)", "__popc(word & lower_lanes >> 1)", 5),
    "copy_masked, wrong count": ("bitmask", "threads) values[i] = 0;", "threads) {}", 6),
    "stage": ("gather", "if (row >= x.rows) continue;", "if (row + 1 >= x.rows) continue;", 0),
    "stage, unaligned": ("gather", "if (k + j < columns) loaded", "if (k + j + 1 < columns) loaded", 1),
    "lora_entries": ("gather", "const int64_t row = by_column ? index", "const int64_t row = !by_column ? index", 0),
    "value_entries": ("gather", "order == nullptr ? j : order[j]", "j", 0),
    "add_product": ("gather", "sums[h] += entry.value", "sums[h] = entry.value", 0),
    "sample_products": ("gather", "slab == first_slab ? sum : out[own] + sum", "sum", 2),
    "sample_products, exchange": ("gather", "upper ? parts[i] : parts[i + kHalf]", "parts[i + kHalf]", 2),
    "sum_ranges": ("gather", "range < ranges; ++range", "range + 1 < ranges; ++range", 2),
    "contract": ("gather", "gradient[order[j]]", "gradient[j]", 3),
    "find_support": ("least_squares", "__ffs(word) - 1)", "(__ffs(word) - 1 ^ 1))", 0),
    "find_support, wide rows": ("least_squares", "    before = found;", "    before = 0;", 0),
    "factor": ("least_squares", "value -= own[r][c] * column[c];", "value -= own[r][c] * column[0];", 0),
    "factor, panel": ("least_squares", "value -= own[k] * block[c][k];", "", 0),
    "factor, block": ("least_squares", "a.row(first + r)[first + c] = block[r][c];", "{}", 0),
    "factor, singular": ("least_squares", "kPivotTolerance * n * diagonal[first + c]", "-1e-9", 2),
    "invert": ("least_squares", "own[r] = value * pivots[first + r];", "own[r] = -value * pivots[first + r];", 0),
    "invert, beyond": ("least_squares", "add(a.row(max(j, middle)) + j, max(j, middle), first);", "{}", 0),
    "solve_rows": ("least_squares", "y[i] -= row[i] * x", "y[i] -= row[0] * x", 0),
    "solve_rows, order": ("least_squares", "const int64_t index = s.order[r];", "const int64_t index = r;", 1),
    "count_digits": ("select", "if (t < head) count_one", "if (t < head - 1) count_one", 1),
    "find_digit": ("select", "needed <= above + counts[i]", "needed < above + counts[i]", 0),
    "pack_above": ("select", "key > above", "key >= above", 0),
    "scan_ties": ("select", "    ties[b] = before;", "    ties[b] = 0;", 0),
    "take_ties": ("select", "quota -= __shfl_sync(kAllLanes, earlier, 0);", "", 0),
    "invalid": ("select", "selectable &= is_selectable(bits)", "selectable &= bits <= 0x7FFFFFFFu", 2),
}


@needs_gxx
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_kernel_is_noticed(name: str, emulation: Emulation) -> None:
    source, before, after, check = MUTATIONS[name]
    operators = emulation.operators(source, (before, after))
    with pytest.raises(AssertionError):
        CHECKS[source][check](operators, "cpu")
