"""Imports run one way: the diagram of DESIGN.md, read from the sources."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each imports only what stands before it: the package itself nothing until it is asked for a name,
# the test harness whatever it likes, and the library never the harness.
ORDER = [
    "__init__",
    "_C",
    "philox",
    "layout",
    "reference",
    "ops",
    "local",
    "config",
    "vocabulary",
    "dense",
    "modules",
    "checkpoint",
    "model",
]
ORDER += [
    "data",
    "optimizer",
    "snapshot",
    "evaluation",
    "ledger",
    "divergence",
    "feed",
    "interruption",
    "journal",
    "log_window",
    "initial",
    "recipe",
    "run_folder",
    "step",
]
ORDER += ["pretrain", "hf", "versions", "installation", "testing", "accuracy", "doctor", "__main__"]
OPTIONAL = {"transformers", "tokenizers", "safetensors", "tqdm", "pyarrow"}
ADAPTERS = "electra_fast/hf/"  # of use only to who has the optional package


def imports(node: ast.AST) -> set[str]:
    """Return the dotted names imported below `node`, those inside functions too."""
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: imports are absolute here"
            names |= {f"{child.module}.{alias.name}" for alias in child.names}
    return names


def parse(pattern: str) -> dict[str, ast.Module]:
    files = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in ROOT.glob(pattern)}
    assert files, f"no file matches {pattern}"
    return files


def third_party(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)} - set(sys.stdlib_module_names)


def test_kernels_know_torch_and_triton_alone():
    for file, tree in parse("kernels/**/*.py").items():
        assert third_party(tree) <= {"torch", "triton", "electra_fast"}, file
        ours = {name for name in imports(tree) if name.startswith("electra_fast")}
        assert all(name.startswith("electra_fast.kernels") for name in ours), f"{file}: {ours}"


def test_reference_knows_torch_alone():
    for name in ("philox", "layout", "reference"):
        for file, tree in parse(f"electra_fast/{name}.py").items():
            assert third_party(tree) <= {"torch", "electra_fast"}, file


def test_each_layer_imports_those_before_it():
    for file, tree in parse("electra_fast/**/*.py").items():
        layer = Path(file).parts[1].removesuffix(".py")
        assert layer in ORDER, f"{file}: give it a place in ORDER"
        for name in imports(tree):
            package, _, rest = name.partition(".")
            if package == "electra_fast" and not rest.startswith("kernels"):
                used = rest.split(".")[0] or "__init__"
                assert used in ORDER[: ORDER.index(layer) + 1], f"{file} imports {name}"


def test_optional_packages_are_imported_where_used():
    for file, tree in parse("electra_fast/**/*.py").items():
        definitions = (ast.FunctionDef, ast.ClassDef)
        for statement in tree.body:
            if not isinstance(statement, definitions) and not file.startswith(ADAPTERS):
                assert not third_party(statement) & OPTIONAL, f"{file}:{statement.lineno}"
