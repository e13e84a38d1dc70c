"""Read a compiled kernel: its registers, its spills, and its instructions by the unit that executes them."""

import collections
import importlib.util
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import networkx

# Patterns of the opcode's first word. U: the uniform datapath. Tensor memory counts as shared memory.
CLASSES = {
    "tensor": r"HMMA|HGMMA|UTCHMMA",
    "mufu": r"MUFU",
    "global": r"LDG|STG|LDGSTS|LD|ST|ATOMG?|REDG?",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|LDTM|STTM",
    "integer": r"U?(IMAD|V?IADD3?|VIADDMNMX|LOP3|SHF|PRMT|ISETP|LEA|V?IMNMX3?|IABS|SGXT|BMSK|POPC|FLO)",
    "float": r"[FHD](ADD|MUL|FMA|MNMX|SETP|SET|SEL|CHK)[23]?",
}
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # bytes; without a size: 4
LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)([^;]*);|^(\.L_x_\d+):", re.M)


class Instruction(NamedTuple):
    guard: str  # "@!P0", or empty
    opcode: str  # "LDG.E.128"
    operands: str
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        word = self.opcode.split(".")[0]
        return next((name for name, words in CLASSES.items() if re.fullmatch(words, word)), "other")

    @property
    def bytes(self) -> int:
        """The bytes of global memory that one thread reads or writes."""
        words = self.opcode.split(".")
        return next((SIZES[word] for word in words if word in SIZES), 4) if self.kind == "global" else 0


def tool(name: str, *arguments) -> str:
    """Return the output of one of the disassemblers in Triton's package."""
    triton = Path(importlib.util.find_spec("triton").origin).parent
    command = [triton / "backends/nvidia/bin" / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(cubin: bytes) -> dict[str, tuple[dict, list[Instruction]]]:
    """Return (resources, instructions) of each function of a cubin, by mangled name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("nvdisasm", "-c", "-ndf", file.name)  # -ndf: no dataflow analysis, a quarter less time
    code = dict(re.findall(r"\.section\s+\.text\.([^,\s]+),(.*?)(?=\.section\s|\Z)", sass, re.S))
    found = {}
    for name, *numbers in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    ):
        registers, stack, shared, local = map(int, numbers)
        use = {"registers": registers, "spill_bytes": stack + local, "shared_bytes": shared}
        found[name] = use, instructions(code[name])
    return found


def instructions(sass: str) -> list[Instruction]:
    found, labels = [], []
    for guard, opcode, operands, label in LINE.findall(sass):
        if label:
            labels.append(label)
        else:
            found.append(Instruction(guard, opcode, operands, tuple(labels)))
            labels.clear()
    return found


def count(code: list[Instruction]) -> dict[str, int]:
    kinds = collections.Counter(instruction.kind for instruction in code)
    return {name: kinds[name] for name in (*CLASSES, "other")}


def main_part(code: list[Instruction]) -> list[Instruction]:
    """Return the loop with the most matrix products, or the longest part of a kernel that has no products.

    A part is a loop, or the code outside of all loops. Products can be outside of loops: the first and the
    last ones of a pipeline, or all products of a kernel that computes one tile.
    """
    target = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
    flow = networkx.DiGraph([(-1, 0)])
    for i, (guard, opcode, operands, _) in enumerate(code):
        word, to = opcode.split(".")[0], re.fullmatch(r"(.*)`\((\.L_x_\d+)\)\s*", operands)
        if word == "BRA" and to:
            flow.add_edge(i, target[to[2]])
        if guard or word not in ("BRA", "EXIT", "RET") or (to and to[1].strip()):  # to[1]: a predicate
            flow.add_edge(i, i + 1)
    every = set(range(len(code)))
    found = list(loops(flow, every))
    outside = every.difference(*found)

    def rank(part: set[int]) -> tuple[bool, int, int]:
        products = sum(code[i].kind == "tensor" for i in part)
        return products > 0 and part is not outside, products, len(part)

    return [code[i] for i in sorted(max((outside, *found), key=rank))]


def loops(flow: networkx.DiGraph, within: set[int]) -> Iterator[set[int]]:
    """Yield the instructions of each loop, without those of its inner loops.

    A loop is a strongly connected component of the control-flow graph. Its inner loops are the loops that
    remain when its entry instructions are removed.
    """
    for part in networkx.strongly_connected_components(flow.subgraph(within)):
        if len(part) > 1:
            entered = {i for i in part if not part.issuperset(flow.predecessors(i))}
            inner = list(loops(flow, part - entered))
            yield part.difference(*inner)
            yield from inner


def flops(code: list[Instruction], warps: int, tcgen05: float = 0) -> float:
    """Return the FLOPs of a block's matrix products; TF32 has half of bfloat16's rate, so it counts twice.

    HMMA.16816 is a 16x8x16 product by one warp, HGMMA.64x128x16 is one by four warps. The shape of a UTCHMMA
    is not in its opcode: `tcgen05` gives its FLOPs.
    """
    total = 0.0
    for opcode in (instruction.opcode for instruction in code if instruction.kind == "tensor"):
        word, shape, *words = f"{opcode}.".split(".")
        times = 2 if "TF32" in words else 1
        if word == "UTCHMMA":
            total += tcgen05
        elif word == "HGMMA":
            total += times * 2 * math.prod(map(int, shape.split("x"))) * warps / 4
        else:
            total += times * 2 * 16 * 8 * int(shape.removeprefix("168")) * warps
    return total


def tcgen05_flops(ptx: str) -> float:
    """Return the mean FLOPs of a kernel's tcgen05 products, counted as bfloat16.

    The instruction descriptor (PTX ISA, tcgen05.mma) contains N / 8 in bits 17 to 22 and M / 16 in bits
    24 to 28. K is 32 bytes.
    """
    values = {name: int(value) for name, value in re.findall(r"mov\.b32\s+(%r\d+), (\d+);", ptx)}
    used = re.findall(r"tcgen05\.mma\.\S+kind::(?:f16|tf32) .*, (%r\d+), %p\d+;", ptx)
    shapes = [(8 * (values[name] >> 17 & 63), 16 * (values[name] >> 24 & 31)) for name in used]
    return sum(2 * M * N * 16 for N, M in shapes) / max(len(shapes), 1)
