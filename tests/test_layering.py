"""Imports run one way, in the order that DESIGN.md draws."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each layer imports only those before it. The package itself imports a module when a name is first used.
ORDER = ["__init__", "_C", "errors", "tables", "pages", "dtypes", "ids", "packing", "philox", "results"]
ORDER += ["reference", "baseline", "ops", "local", "capture", "versions", "distributed", "config", "linear"]
ORDER += ["resize", "inference", "modules", "pretrained", "generators", "decoder", "two_tower", "electric"]
ORDER += ["model", "heads", "data", "hf", "tasks", "train", "use"]
ORDER += ["export", "accuracy", "testing", "doctor", "pytest_plugin", "__main__"]
# The same within train/.
TRAIN = ["__init__", "checkpoint", "options", "recipe", "run_folder", "warm_start", "loader", "corpus"]
TRAIN += ["interruption", "metrics", "logger", "divergence", "optimizer", "log_window", "evaluation"]
TRAIN += ["gradients", "step", "saver"]
TRAIN += ["training", "pretrain", "fine_tune_recipe", "task_data", "fine_tuned", "line_chart"]
TRAIN += ["fine_tune_page", "results", "fine_tune", "tokens"]
USE = "texts pretrained likelihood detect score choose suggest fine_tuned write understand".split()
USE += ["pairs_files", "pairs", "pairs_page", "__init__", "files", "command"]
OPTIONAL = {"transformers", "tokenizers", "safetensors", "tqdm", "pyarrow", "sklearn", "scipy"}
OPTIONAL |= {"onnx", "onnxruntime", "openvino", "rouge_score", "sacrebleu"}
ADAPTERS = "electra_fast/hf/"  # useful only with the optional package


def imports(node: ast.AST) -> set[str]:
    """Return the dotted names imported below `node`, also inside functions."""
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


def test_kernels_import_only_torch_and_triton():
    for file, tree in parse("kernels/**/*.py").items():
        assert third_party(tree) <= {"torch", "triton", "electra_fast"}, file
        ours = {name for name in imports(tree) if name.startswith("electra_fast")}
        assert all(name.startswith("electra_fast.kernels") for name in ours), f"{file}: {ours}"


def test_the_reference_imports_only_torch():
    for name in ("dtypes", "ids", "packing", "philox", "results", "reference"):
        for file, tree in parse(f"electra_fast/{name}.py").items():
            assert third_party(tree) <= {"torch", "electra_fast"}, file


def check_order(order: list[str], package: str, folder: str, files: str) -> None:
    """Assert that each module of a package imports only those before it in `order`."""
    for file, tree in parse(files).items():
        layer = Path(file).relative_to(folder).parts[0].removesuffix(".py")
        assert layer in order, f"{file}: add it to the order"
        for name in imports(tree):
            if name.startswith(f"{package}.") and not name.startswith("electra_fast.kernels"):
                used = name.removeprefix(f"{package}.").split(".")[0]
                used = used if used in order else "__init__"  # a name that the package itself defines
                assert used in order[: order.index(layer) + 1], f"{file} imports {name}"


def test_each_layer_imports_those_before_it():
    check_order(ORDER, "electra_fast", "electra_fast", "electra_fast/**/*.py")


def test_within_train_each_module_imports_those_before_it():
    check_order(TRAIN, "electra_fast.train", "electra_fast/train", "electra_fast/train/*.py")


def test_within_use_each_module_imports_those_before_it():
    check_order(USE, "electra_fast.use", "electra_fast/use", "electra_fast/use/*.py")


def test_optional_packages_are_imported_where_used():
    for file, tree in parse("electra_fast/**/*.py").items():
        definitions = (ast.FunctionDef, ast.ClassDef)
        for statement in tree.body:
            if not isinstance(statement, definitions) and not file.startswith(ADAPTERS):
                assert not third_party(statement) & OPTIONAL, f"{file}:{statement.lineno}"


def test_the_library_has_no_assert_statement():
    """pytest rewrites the assertions of a package that has a plugin, and would change its messages."""
    for file, tree in parse("electra_fast/**/*.py").items():
        lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert not lines, f"{file}:{lines}: raise AssertionError instead"


def test_plugins_of_tests_have_fixtures_of_different_names():
    """A plugin of one test file is loaded for all of them, and the last fixture of a name wins."""
    plugins, found = set(), []
    for tree in parse("tests/test_*.py").values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytest_plugins":
                plugins |= set(ast.literal_eval(node.value)) - {"pytester"}
    assert len(plugins) > 2
    for name in plugins:
        for tree in parse(f"tests/{name}.py").values():
            functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
            found += [f.name for f in functions if any("fixture" in ast.unparse(d) for d in f.decorator_list)]
    assert sorted(found) == sorted(set(found))
