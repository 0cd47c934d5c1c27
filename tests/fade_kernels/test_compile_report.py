"""Every kernel that ships compiles for GPUs that are not here, within their limits."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fade_kernels import compile_report
from fade_kernels.compile_report import Row, check, count_matrix_instructions, parse_ptxas, resource_usage, short_name
from fade_kernels.triton_kernels.launch import Allowance

FAR_OVER = 300 * 1024

CUOBJDUMP = """
Fatbin elf code:
arch = sm_90
 Function masked_kernel:
  REG:168 STACK:24 SHARED:1024 LOCAL:8 CONSTANT[0]:656 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4packPKbPii' for 'sm_90'
ptxas info    : Function properties for _Z4packPKbPii
    16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 16 bytes cumulative stack size, 8192 bytes smem
ptxas info    : Compile time = 3.1 ms
ptxas info    : Compiling entry function '_Z5countv' for 'sm_90'
ptxas info    : Function properties for _Z5countv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""

WGMMA = """
wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1,%f2}, {%r1,%r2,%r3,%r4}, %rd1, p, 1, 1, 0;
wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1,%f2}, %rd7, %rd1, p, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
"""


def test_reads_resource_usage() -> None:
    assert resource_usage(CUOBJDUMP) == (168, 32)
    with pytest.raises(ValueError, match="nothing about registers"):
        resource_usage("no device code")


def test_reads_what_ptxas_says() -> None:
    assert list(parse_ptxas(PTXAS)) == [("_Z4packPKbPii", 32, 16, 8192), ("_Z5countv", 10, 0, 0)]


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("void fade::pack(bool const*, int*)", "fade::pack"),
        (
            "void fade::(anonymous namespace)::add<(fade::Magnitude)0>(fade::Table<float>)",
            "fade::add<(fade::Magnitude)0>",
        ),
        ("kernel", "kernel"),
    ],
)
def test_shortens_names(signature: str, name: str) -> None:
    assert short_name(signature) == name


def test_counts_matrix_instructions() -> None:
    assert count_matrix_instructions(WGMMA, 90) == (2, 1)
    assert count_matrix_instructions("mma.sync.aligned.m16n8k16 ...;", 90) == (0, 0)
    assert count_matrix_instructions("mma.sync.aligned.m16n8k16 ...;\nmma.sync.aligned ...;", 80) == (2, None)
    assert count_matrix_instructions("tcgen05.mma.cta_group::1.kind::f16 ...;\ntcgen05.commit ...;", 100) == (1, None)


@pytest.mark.parametrize(
    ("row", "arch", "says"),
    [
        (Row("k", "c", "sm_90", 255, 8, 0, 4, 4), 90, ["spills 8 bytes, 0 are allowed"]),
        (Row("k", "c", "sm_80", 255, 8, 0, 4), 80, []),
        (Row("k", "c", "sm_90", 9, 0, FAR_OVER, 4, 4), 90, ["needs 307200 bytes of shared memory, sm_90 has 232448"]),
        (Row("k", "c", "sm_90", 9, 0, 0, 0, 0), 90, ["has no wgmma instructions"]),
        (Row("k", "c", "sm_80", 9, 0, 0, 0), 80, ["has no tensor-core instructions"]),
        (Row("k", "c", "sm_90", 9, 0, 227 * 1024, 4, 4), 90, []),
    ],
)
def test_finds_violations(row: Row, arch: int, says: list[str]) -> None:
    check(row, arch, tensor_cores=True)
    assert row.violations == says


GPU_IR = """
  tt.func public @kernel() {
    %0 = tt.load %before : tensor<64x!tt.ptr<bf16>>
    %1:2 = scf.for %i = %a to %b step %c iter_args(%acc = %zero, %n = %first) -> (i32) {
      %2 = ttg.async_copy_global_to_local %p, %q : tensor<64x64x!tt.ptr<bf16>>
      %3 = ttng.warp_group_dot %w, %x, %acc {isAsync = true} : tensor<64x64xf32>
      %4:2 = ttng.warp_group_dot_wait %3, %w {pendings = 1 : i32} : tensor<64x64xf32>
      scf.yield %4#0 : tensor<64x64xf32>
    }
    %5 = ttng.warp_group_dot_wait %1#0 {pendings = 0 : i32} : tensor<64x64xf32>
    %6 = scf.for %j = %a to %b step %c iter_args(%sum = %zero) -> (i32) {
      %7 = tt.load %partial : tensor<64x!tt.ptr<f32>>
      scf.yield %7 : tensor<64xf32>
    }
  }
"""


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("", "", (0, 0)),
        ("{isAsync = true} ", "", (0, 1)),
        ("pendings = 1", "pendings = 0", (0, 1)),
        ("%2 = ttg.async_copy_global_to_local %p, %q", "%2 = tt.load %p", (1, 0)),
        ("ttng.warp_group_dot %w, %x, %acc {isAsync = true}", "tt.dot %w, %x, %acc", (0, 1)),
        ("%7 = tt.load %partial", "%8 = tt.dot %w, %x, %sum\n      %7 = tt.load %partial", (1, 1)),
    ],
    ids=["pipelined", "synchronous", "waits at once", "loads", "old product", "second loop"],
)
def test_finds_what_is_not_pipelined(old: str, new: str, found: tuple[int, int]) -> None:
    assert compile_report.unpipelined(GPU_IR.replace(old, new) if old else GPU_IR) == found


def test_what_is_not_pipelined_must_be_allowed() -> None:
    allowed = (Allowance("load", 1, "a reason"), Allowance("wait", 1, "a reason"))
    row = Row("k", "c", "sm_90", 9, 0, 0, 4, 4, loads=1, waits=2)
    check(row, 90, tensor_cores=True, allowed=allowed)
    assert row.violations == ["2 waits in loops of matrix products are not pipelined, 1 are allowed"]


def test_a_spill_must_be_allowed() -> None:
    for spilled, says in ((16, []), (24, ["spills 24 bytes, 16 are allowed"])):
        row = Row("k", "c", "sm_90", 255, spilled, 0, 4, 4)
        check(row, 90, tensor_cores=True, allowed=(Allowance("spill", 16, "a reason"),))
        assert row.violations == says


def test_a_kernel_that_is_not_pipelined_is_a_violation() -> None:
    name = "fade_kernels.triton_kernels.weight_gradient_magnitude"
    case = next(case for case in compile_report.cases_of(name) if case.dtype == "bf16")
    row = compile_report.compile_triton_case(replace(case, tiling=replace(case.tiling, num_stages=1)), 90)
    assert row.loads == 2 and any("2 loads" in violation for violation in row.violations)


def test_every_allowance_has_a_reason() -> None:
    for module in compile_report.triton_modules():
        for case in compile_report.cases_of(module):
            assert all(a.reason and a.kind in ("load", "wait", "spill") and a.count > 0 for a in case.allowed), (
                case.name
            )


def test_command_fails_on_a_violation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("good", "bf16 BT64", "sm_90", 9, 0, 64, 1, 1), Row("bad", "bf16 BT256", "sm_90", violations=["spills"])]
    monkeypatch.setattr(compile_report, "compile_all", lambda *_, **__: rows)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert compile_report.main(["--json", str(tmp_path / "new" / "report.json")]) == 1
    out, err = capsys.readouterr()
    assert "violation: bad, bf16 BT256, sm_90: spills" in err and "violation: good" not in err
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["1", "FAILS"]
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    keys = {"kernel", "configuration", "architecture", "registers", "spill_bytes", "shared_bytes", "tensor_core"}
    assert all(keys <= row.keys() for row in written)
    monkeypatch.setattr(compile_report, "compile_all", lambda *_, **__: rows[:1])
    assert compile_report.main([]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--jobs", "0"], "--jobs"), (["--kernel", "no such kernel"], "no such kernel"), (["--arch", "x"], "--arch")],
)
def test_command_refuses_wrong_calls(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stop:
        compile_report.main(arguments)
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.skipif(compile_report.find_nvcc() is None, reason="nvcc is not here")
def test_broken_sources_are_violations(tmp_path: Path) -> None:
    source = tmp_path / "csrc" / "cuda" / "broken.cu"
    source.parent.mkdir(parents=True)
    source.write_text("__global__ void kernel() { undeclared; }\n")
    (row,) = compile_report.compile_cuda_file(source, 90)
    assert row.violations and "undeclared" in row.violations[0]


def test_every_kernel_compiles_within_the_limits() -> None:
    # All for sm_90, one of each kernel for the others: `python -m fade_kernels.compile_report` compiles everything.
    rows = compile_report.compile_all((90,), workers=min(4, os.cpu_count() or 1), one_of_each=(80, 100))
    assert {row.architecture for row in rows} >= {"sm_80", "sm_90", "sm_100"}
    failed = [f"{row.kernel}, {row.configuration}, {row.architecture}: {row.violations}" for row in rows]
    assert not any(row.violations for row in rows), "\n".join(line for line in failed if not line.endswith("[]"))
    for row in rows:
        made_in_registers = row.kernel.startswith(("masked_lora_forward", "masked_lora_input_gradient"))
        if made_in_registers and row.architecture == "sm_90" and row.tensor_core:
            assert row.register_form, f"{row.kernel}, {row.configuration}: the delta goes through shared memory"
