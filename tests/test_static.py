"""The committed figures of compiled kernels: how they are counted and compared, and what is refused."""

import json
import re
import sys
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks import __main__ as harness
from benchmarks.static import aot, command, cuda, figures, gpus, sass, summary

ROOT = Path(__file__).parents[1]
COMMITTED = figures.load()


@pytest.fixture
def rows(monkeypatch):
    """Return the committed rows, as if the installed compilers had made them."""
    monkeypatch.setattr(figures, "compilers", lambda: COMMITTED["compilers"])
    return [dict(row) for row in COMMITTED["rows"]]


def test_every_kernel_has_figures_of_every_architecture():
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    launched = set(re.findall(r"^ +launch\(\s*_?(\w+),", sources, re.M)) - {"kernel"}
    triton = {row["kernel"] for row in COMMITTED["rows"] if figures.compiler(row) == "triton"}
    assert launched and launched <= triton, launched - triton
    for kernel in {row["kernel"] for row in COMMITTED["rows"]}:
        assert {row["arch"] for row in COMMITTED["rows"] if row["kernel"] == kernel} == set(gpus.GPUS), kernel


def test_the_figures_are_of_the_pinned_compilers():
    pinned = (ROOT / "requirements.txt").read_text()
    triton, toolkit = re.findall(r"^(?:triton|cuda-toolkit\[.*nvcc.*\])==(\d+\.\d+)", pinned, re.M)
    made = {name: version.rpartition(".")[0] for name, version in COMMITTED["compilers"].items()}
    assert made == {"triton": triton, "nvcc": toolkit}, figures.UPDATE


def test_the_readme_says_what_spills():
    spilling = [row for row in COMMITTED["rows"] if row["spill_bytes"]]
    assert all(row["kernel"].startswith("attention") for row in spilling)
    assert all(row["variant"].startswith("fp32") and "D=128" in row["variant"] for row in spilling)
    most = max(row["spill_bytes"] for row in spilling)
    assert f"attention with heads of 128 columns ({most} bytes)" in (ROOT / "README.md").read_text()


def test_a_kernel_that_was_not_compiled_has_the_figures_of_its_source(monkeypatch):
    monkeypatch.setattr(aot, "read", lambda arch, kernel: {"spill_bytes": 7})
    fn = SimpleNamespace(__name__="_a_kernel", arg_names=["BLOCK"])
    src = SimpleNamespace(fn=fn, constants={(0,): 8}, signature={})
    committed = {aot.source("1"): {"spill_bytes": 0}}
    compiled, known = (SimpleNamespace(hash="1", src=src, **asm) for asm in ({"asm": {}}, {}))
    row = aot.row_of(90, "ops", compiled, committed)
    assert row["spill_bytes"] == 7 and row["shape"] == "BLOCK=8"
    assert aot.row_of(90, "ops", known, committed) == row | {"spill_bytes": 0}
    assert aot.source("2") != aot.source("1")
    monkeypatch.setattr(aot, "COUNTING", [b"counted otherwise"])
    assert aot.source("1") not in committed


def test_nothing_differs_from_itself(rows):
    assert figures.changes(rows, COMMITTED) == []


@pytest.mark.parametrize(
    ("column", "change", "worse"),
    [
        ("spill_bytes", lambda n: n + 4, True),
        ("occupancy", lambda n: n - 1, True),
        ("tensor", lambda n: n - 1, True),
        ("instructions", lambda n: int(1.06 * n) + 1, True),
        ("instructions", lambda n: n + 1, False),
        ("instructions", lambda n: n - 8, False),
        ("registers", lambda n: n + 1, False),
        ("warps", lambda n: 2 * n, True),
        ("warps", lambda n: n // 2, False),
        ("mufu", lambda n: n - 1, False),
        ("memory_clocks", lambda n: 10 * n, True),
        ("tensor_clocks", lambda n: n + 1, False),  # not the longest wait
        ("shape", lambda words: words.replace("BLOCK_M=128", "BLOCK_M=64"), False),
    ],
)
def test_a_planted_change_is_flagged(rows, column, change, worse):
    is_like = {"kernel": "attention_fwd_loop", "arch": 90, "tensor_clocks": 512}.items()
    row = next(row for row in rows if is_like <= row.items())
    row[column] = change(row[column])
    (found,) = figures.changes(rows, COMMITTED)
    assert found.worse == worse and "sm_90 attention_fwd_loop" in found.line and column in found.line
    assert found.line.endswith("; worse") == worse


def test_a_kernel_that_comes_or_goes_is_named(rows):
    rows[0]["variant"] += " E=7"
    found = figures.changes(rows, COMMITTED)
    assert sorted(change.line.rpartition(": ")[2] for change in found) == ["new", "no longer compiled"]
    assert not any(change.worse for change in found)
    rows[0]["spill_bytes"] = 8
    (found,) = [change for change in figures.changes(rows, COMMITTED) if change.worse]
    assert found.line.endswith("new, spills 8 bytes")


def test_only_what_was_made_is_compared(rows):
    some = [row for row in rows if (row["arch"], row["part"]) == (90, "attention")]
    assert figures.changes(some, COMMITTED) == []
    assert "no longer compiled" in figures.changes(some[1:], COMMITTED)[0].line


def test_another_compiler_is_no_regression(rows, monkeypatch, capsys):
    monkeypatch.setattr(figures, "compilers", lambda: {**COMMITTED["compilers"], "triton": "9.9"})
    rows = [row | {"spill_bytes": 400} for row in rows if figures.compiler(row) == "triton"]
    monkeypatch.setattr(command, "compiled", lambda architectures: rows)
    assert figures.changes(rows, COMMITTED) == [] and command.main(["--compare"]) == 2
    assert "not compared: the committed figures are from triton 3" in capsys.readouterr().out


def test_the_command_compares(rows, monkeypatch, capsys):
    monkeypatch.setattr(command, "compiled", lambda architectures: rows)
    assert harness.main(["static", "--compare"]) == 0 and "nothing changed" in capsys.readouterr().out
    last = rows[-1]
    last["spill_bytes"] = 8000
    assert harness.main(["static", "--compare"]) == 1
    assert "spill_bytes 0 -> 8000" in capsys.readouterr().out
    assert harness.main(["static"]) == 0
    head, first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(last["kernel"]) and " 8000 " in first, "kernels that spill come first"
    assert len({len(line) for line in (head, first, *others)}) == 1
    assert len(others) + 1 == len({(figures.compiler(r), r["kernel"], r["arch"]) for r in rows})
    assert harness.main(["static", "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1


@pytest.mark.parametrize("options", [["--arch", "90", "80"], ["--arch", "80", "--arch", "90", "90"]])
def test_architectures_add_up(rows, monkeypatch, options):
    asked = []
    monkeypatch.setattr(command, "compiled", lambda architectures: asked.append(architectures) or rows)
    assert harness.main(["static", *options]) == 0 and harness.main(["static"]) == 0
    assert asked == [[80, 90], [*gpus.GPUS]]


def test_a_kernel_that_does_not_compile_is_an_error(rows, monkeypatch, capsys):
    def fail(architectures):
        raise RuntimeError("static: ops does not compile for sm_90")

    monkeypatch.setattr(command, "compiled", fail)
    assert harness.main(["static"]) == 1 and "does not compile" in capsys.readouterr().err
    assert harness.main(["static", "--update", "--arch", "90"]) == 2
    assert "must be for every architecture" in capsys.readouterr().err


def test_a_line_is_of_all_variants(rows):
    (line,) = [found for found in summary.lines(rows) if (found.name, found.arch) == ("add_norm_fwd", 90)]
    cells = dict(zip(summary.HEAD, line.cells(), strict=True))
    low, high = map(int, cells["registers"].split(".."))
    assert {low, high} <= {row["registers"] for row in line.rows} and int(cells["variants"]) == len(line.rows)
    assert sum(line.mix().values()) == pytest.approx(1)


def test_figures_without_nvcc_keep_its_rows(rows, monkeypatch, tmp_path):
    file = tmp_path / "figures.json"
    figures.save(rows, COMMITTED["compilers"], file)
    assert file.read_text() == figures.FILE.read_text()
    monkeypatch.setattr(figures, "compilers", lambda: {**COMMITTED["compilers"], "nvcc": None})
    figures.update([row for row in rows if figures.compiler(row) == "triton"], file)
    assert figures.load(file) == COMMITTED


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": [[1]]}', '{"rows": [], "columns": []}'])
def test_foreign_figures_are_refused(text, tmp_path):
    file = tmp_path / "figures.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"static: .*json must contain the figures of.* --update writes it"):
        figures.load(file)


def test_truncated_figures_are_refused(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text(figures.FILE.read_text()[:-40])
    with pytest.raises(ValueError, match="must contain the figures"):
        figures.load(file)


def test_blocks_of_a_multiprocessor():
    assert gpus.blocks(90, 4, 128, 0) == 4  # 65536 / (128 * 128)
    assert gpus.blocks(90, 4, 129, 0) == 3  # registers are allocated in units of eight per thread
    assert gpus.blocks(90, 1, 16, 0) == 32 and gpus.blocks(86, 1, 16, 0) == 16
    assert gpus.blocks(80, 4, 32, 64 << 10) == 2 and gpus.blocks(86, 4, 32, 64 << 10) == 1
    assert gpus.occupancy(90, 4, 128, 0) == 25 and gpus.occupancy(86, 4, 128, 0) == 33


SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   MUFU.EX2 R5, R5 ;
        /*0040*/                   FFMA R5, R5, R6, R7 ;
        /*0050*/              @!P0 STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0060*/              @UP1 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0070*/                   BRA.U UP0, `(.L_x_0) ;
.L_x_2:
        /*0080*/                   LDS.64 R8, [R9] ;
        /*0090*/                   BRA.DIV UR4, `(.L_x_4) ;
.L_x_3:
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   MOV R1, R2 ;
        /*00c0*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00d0*/                   BRA `(.L_x_5);
        /*00e0*/                   NOP;
"""


def test_instructions_are_counted_by_class():
    code = sass.instructions(SASS)
    assert len(code) == 15 and sum(instruction.bytes for instruction in code) == 16 + 2
    kinds = {"tensor": 1, "mufu": 1, "global": 2, "shared": 1, "integer": 1, "float": 1, "other": 8}
    assert sass.count(code) == kinds


def test_the_main_part_is_the_loop_that_multiplies_or_else_the_longest_part():
    code = sass.instructions(SASS)
    assert sass.main_part(code) == code[2:8]
    plain = sass.instructions(SASS.replace("HGMMA", "NOP"))
    assert sass.main_part(plain) == [*plain[:2], *plain[8:]], "a jump back from aside is not a loop"
    nested = sass.instructions(".L_x_6:" + SASS.replace("BRA.DIV UR4, `(.L_x_4)", "@P0 BRA `(.L_x_6)"))
    assert sass.main_part(nested) == nested[2:8], "the inner one of two loops"


def test_products_are_counted_from_their_shapes():
    for opcode, flops in {
        "HMMA.16816.F32.BF16": 4 * 2 * 16 * 8 * 16,
        "HMMA.1688.F32.TF32": 2 * 4 * 2 * 16 * 8 * 8,
        "HGMMA.64x128x16.F32.BF16": 2 * 64 * 128 * 16,
        "HGMMA.64x16x8.F32.TF32": 2 * 2 * 64 * 16 * 8,
        "UTCHMMA": 100,
    }.items():
        assert sass.flops([sass.Instruction("", opcode, "")], warps=4, tcgen05=100) == flops
    ptx = f"mov.b32 %r9, {0x8200010};\n@%p3 tcgen05.mma.cta_group::1.kind::f16 [ %r2 ], %rd1, %rd2, %r9, %p4;"
    assert sass.tcgen05_flops(ptx) == 2 * 128 * 128 * 16
    assert sass.tcgen05_flops("") == 0


@pytest.mark.parametrize("kernel", ["attention_fwd_tile", "attention_fwd_loop"])
def test_each_gpu_has_the_same_products_to_do(kernel):
    """4 BLOCK_M BLOCK_N D FLOPs, whether a compiler uses mma.sync, wgmma or tcgen05."""
    seen = set()
    for row in COMMITTED["rows"]:
        if row["kernel"] == kernel and row["variant"].startswith("bf16") and "D=64" in row["variant"]:
            M, N = (int(re.search(rf"BLOCK_{side}=(\d+)", row["shape"])[1]) for side in "MN")
            assert row["tensor_clocks"] == round(4 * M * N * 64 / gpus.GPUS[row["arch"]].flops), row
            seen.add(row["arch"])
    assert seen == set(gpus.GPUS)


def test_the_bound_is_the_longest_wait():
    code = sass.instructions(SASS)[2:8]
    waits = gpus.waits(90, 4, code)
    assert waits == {"tensor": 32, "mufu": 8, "memory": round(128 * 2 / 18.4), "issue": 6}
    assert gpus.bound({f"{name}_clocks": clocks for name, clocks in waits.items()}) == ("tensor", 32)


def test_the_pinned_nvcc_goes_before_the_one_on_the_path(monkeypatch):
    class Wheel(PurePosixPath):
        def locate(self):
            return PurePosixPath("/wheel") / self

    files = [Wheel("bin/nvcc.profile"), Wheel("bin/nvcc")]
    monkeypatch.setattr(cuda.shutil, "which", lambda name: f"/path/{name}")
    monkeypatch.setattr(cuda.importlib.metadata, "files", lambda package: files)
    assert cuda.find_nvcc() == "/wheel/bin/nvcc"
    monkeypatch.setattr(cuda.importlib.metadata, "files", lambda package: None)
    assert cuda.find_nvcc() == "/path/nvcc"


def test_the_rows_are_json(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "compiled", lambda architectures: rows)
    assert command.main(["--json", str(tmp_path / "rows.json")]) == 0
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
