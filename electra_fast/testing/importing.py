"""Functions that are given as text: "module:function"."""

import importlib
import os
import sys
from collections.abc import Callable

from electra_fast.errors import must


def imported(option: str, name: str) -> Callable:
    """Return the function of "module:function"; modules of the current folder can be imported too.

    Raises:
        ValueError: it does not exist or is not callable; the message begins with `option`.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        function = importlib.import_module(module)
        for part in attribute.split("."):  # also a method of a class: "module:Class.apply"
            function = getattr(function, part)
    except (Exception, SystemExit) as error:  # of any type: the module runs code of its own
        got = f"{name}: {type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(must(option, "be an importable module:function", got)) from None
    if not callable(function):
        got = f"{name} of type {type(function).__name__}"
        raise ValueError(must(option, "name a function", got))
    return function
