"""Faults for Triton kernels, planted in the source of a file by patterns."""

import ast
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

KINDS = ("mask", "scale", "range", "grid", "sum", "precision", "overflow")
MASKED = {"load": 1, "store": 2, "atomic_add": 2}  # the number of arguments before the mask
NARROWER = {"float32": "float16", "float64": "float32"}
ATOMS = (ast.Attribute, ast.Call, ast.Constant, ast.Name, ast.Subscript)  # they need no parentheses


@dataclass(frozen=True)
class Fault:
    """A fault that is planted in a file."""

    line: int  # from 1
    kind: str  # one of KINDS
    source: str  # the changed line
    file: str = field(repr=False)  # the whole file with the fault
    found_by: str = ""  # "AssertionError: …", "crash: SIGSEGV", "time limit: 60 s"; empty if let through


class _File:
    """The lines of a file in UTF-8, because `ast` counts the columns of nodes in bytes."""

    def __init__(self, text: str):
        self.lines = text.encode().splitlines(keepends=True)

    def text(self, node: ast.AST) -> str:
        lines = self.lines[node.lineno - 1 : node.end_lineno]
        lines[-1] = lines[-1][: node.end_col_offset]
        lines[0] = lines[0][node.col_offset :]
        return b"".join(lines).decode()

    def operand(self, node: ast.AST) -> str:
        return self.text(node) if isinstance(node, ATOMS) else f"({self.text(node)})"

    def scaled(self, node: ast.AST) -> str:
        return f"({self.operand(node)} * 1.01)"

    def fault(self, kind: str, node: ast.AST, new: str) -> Fault:
        """Return the fault that replaces a node by the source `new`."""
        before, after = self.lines[: node.lineno - 1], self.lines[node.end_lineno :]
        first, last = self.lines[node.lineno - 1], self.lines[node.end_lineno - 1]
        line = first[: node.col_offset] + new.encode() + last[node.end_col_offset :]
        file = b"".join([*before, line, *after]).decode()
        return Fault(node.lineno, kind, " ".join(line.decode().split()), file)


def _called(node: ast.Call) -> str:
    """Return the last part of the name of a called function: "load" for `tl.load(…)`."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _in_node(file: _File, node: ast.AST, tl: str) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield (kind, the node to replace, its new source) for a node of a kernel; `tl` is triton.language."""
    match node:
        case ast.Call():
            yield from _in_call(file, node)
        case ast.Compare(ops=[ast.Lt() | ast.LtE()], comparators=[bound]):
            if not isinstance(bound, ast.Constant):
                yield "range", bound, f"{file.operand(bound)} - 1"
        case ast.BinOp(op=ast.Mult() | ast.Div()) | ast.AugAssign(op=ast.Mult() | ast.Div()):
            for factor in ast.iter_child_nodes(node):
                loaded = isinstance(getattr(factor, "ctx", None), ast.Load)  # a name, an attribute, an item
                if loaded and "scale" in file.text(factor).lower():
                    yield "scale", factor, file.scaled(factor)
        case ast.AugAssign(op=ast.Add(), target=target, value=value):
            yield "sum", node, file.text(node).replace("+=", "=", 1)
            if not isinstance(value, ast.Constant):
                # In the interpreter, float16 zeros plus float32 are float32, so the sum is rounded instead.
                acc = file.text(target)
                rounded = f"({acc} + {file.operand(value)}).to({tl}.float16).to({acc}.dtype)"
                yield "precision", node, f"{acc} = {rounded}"


def _in_call(file: _File, node: ast.Call) -> Iterator[tuple[str, ast.AST, str]]:
    name, args, keywords = _called(node), node.args, {k.arg: k.value for k in node.keywords}
    if name in MASKED and (len(args) > MASKED[name] or "mask" in keywords):
        kept = args[: MASKED[name]] + [k for k in node.keywords if k.arg not in ("mask", "other")]
        yield "mask", node, f"{file.text(node.func)}({', '.join(map(file.text, kept))})"
    if name in ("store", "atomic_add") and len(args) > 1 and not re.search(r"\bu?int\d", file.text(args[1])):
        cast = isinstance(args[1], ast.Call) and _called(args[1]) == "to"
        value = args[1].func.value if cast else args[1]  # it is scaled before it is rounded
        yield "scale", value, file.scaled(value)
    if name in ("sum", "dot", "mean"):
        yield "scale", node, file.scaled(node)
    if name == "where" and len(args) == 3:
        _, x, y = args
        fills = isinstance(x, ast.Constant) and not isinstance(y, ast.Constant)
        yield "mask", node, file.operand(y if fills else x)
    if name in ("range", "static_range") and args:
        start, stop = args[0], args[min(len(args), 2) - 1]
        step = file.operand(args[2]) if len(args) > 2 else "1"
        yield "range", stop, f"{file.operand(stop)} - 1"
        yield "range", start, f"{file.operand(start)} + {step}" if len(args) > 1 else f"1, {file.text(stop)}"
    if name in ("exp", "exp2"):
        match args:
            case [ast.BinOp(op=ast.Sub(), left=x)]:
                yield "overflow", args[0], file.text(x)
    if name not in ("zeros", "full") and "bitcast" not in keywords:
        for value in (*args, *keywords.values()):
            if isinstance(value, ast.Attribute) and value.attr in NARROWER:
                yield "precision", value, f"{file.text(value.value)}.{NARROWER[value.attr]}"


def plant(text: str, kinds: Collection[str] = KINDS) -> list[Fault]:
    """Return the faults of these kinds that fit the Triton kernels in the source of a file, from the top."""
    tree, file, names, inside = ast.parse(text), _File(text), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names |= {f"{prefix}{alias.name}": alias.asname or alias.name for alias in node.names}
    jit = (names.get("triton.jit"), f"{names.get('triton')}.jit")
    for node in ast.walk(tree):
        decorators = [getattr(d, "func", d) for d in getattr(node, "decorator_list", ())]
        if any(ast.unparse(decorator) in jit for decorator in decorators):
            inside |= {child for statement in node.body for child in ast.walk(statement)}

    edits = []
    for node in ast.walk(tree):
        if node in inside:
            edits += _in_node(file, node, names.get("triton.language", "triton.language"))
        elif isinstance(node, ast.Call) and _called(node) == "cdiv" and len(node.args) == 2:
            edits.append(("grid", node, f"max({' // '.join(map(file.operand, node.args))}, 1)"))
    edits.sort(key=lambda edit: (edit[1].lineno, edit[1].col_offset))
    faults = [file.fault(*edit) for edit in edits if edit[0] in kinds]
    return list({fault.file: fault for fault in faults}.values())  # two patterns may make the same edit
