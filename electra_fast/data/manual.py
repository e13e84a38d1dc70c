"""A corpus that needs no download: Python's own manual, one paragraph per line."""

import ast
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from electra_fast.data.cache_folder import cached


def python_manual() -> str:
    """Return the topics of ``help()`` and the standard library's docstrings, 2 MB."""
    # Reading it takes 4 seconds. sys.version contains the build date, so another build has another key.
    return cached(f"manual 1 {sys.version} {sys.base_prefix}", _read)


def _read() -> str:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        # Tests are more code than prose, some are malformed on purpose, and not every Python has them.
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        subfolders[:] = sorted(set(subfolders) - skip)
        for name in sorted(names):
            if name.endswith(".py"):
                texts.append("\n\n".join(_docstrings(Path(folder, name).read_bytes())))
    # Hard-wrapped paragraphs become one line each.
    paragraphs = ([" ".join(p.split()) for p in re.split(r"\n\s*\n", text)] for text in texts)
    documents = ("\n".join(filter(None, ps)) for ps in paragraphs)
    return "\n\n".join(document for document in documents if document)


def _docstrings(source: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The compiler warns about the code that it parses.
        try:
            nodes = [ast.parse(source)]
        except (SyntaxError, ValueError):  # Some distributions include files for an older Python.
            return
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False) or ""
        # Expressions are most of the tree, but contain no definition with a docstring.
        nodes += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)][::-1]
