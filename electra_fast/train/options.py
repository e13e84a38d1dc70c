"""Options of a command that trains: on the command line, and in the file recipe.json of the run."""

import dataclasses
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from electra_fast import local
from electra_fast.errors import must


def option(default: Any, help: str | None, off: tuple[str, str] | None = None) -> Any:
    """Return the field of an option.

    `help` is None for a positional argument. `off` is the name and the help of an option that sets False.
    """
    return field(default=None, metadata={"help": help, "default": default, "off": off})


@dataclass(frozen=True)
class Options:
    """The options of a run. One that is not given is None until `resolved` sets its default."""

    command: ClassVar[str]  # its name, for messages
    changeable: ClassVar[frozenset[str]]  # the options that a resumed run may change
    another: ClassVar[str] = "start another run with --out"  # the remedy for the other options

    def resolved(self, processes: int = 1) -> Self:
        """Return all options, with the defaults of those that were not given.

        Several processes divide the default batch of a step: each has one micro-batch.

        Raises:
            ValueError: an option is wrong; the message names it.
        """
        raise NotImplementedError

    def save(self, file: Path) -> None:
        local.write_json(file, dataclasses.asdict(self))

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: it does not exist.
            ValueError: it is not a regular file, or a field is unknown or of another type.
        """
        fields = local.json_object(cls.command, file)
        unknown = fields.keys() - {f.name for f in dataclasses.fields(cls)}
        if ("task" in unknown and "model" in unknown) or {"data", "held_out"} <= unknown:
            got = "that of another command"
            raise ValueError(must(f"{cls.command}: {file}", f"be the recipe of a {cls.command} run", got))
        if unknown:
            rule = "have the fields of a recipe"
            raise ValueError(must(f"{cls.command}: {file}", rule, ", ".join(sorted(unknown))))
        hints = typing.get_type_hints(cls)
        for name, value in fields.items():
            if value is not None and not _is(value, hints[name]):
                type_ = getattr(hints[name], "__name__", hints[name])
                raise ValueError(must(f"{cls.command}: {name} in {file}", f"be of type {type_}", repr(value)))
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})

    def given(self) -> dict[str, Any]:
        """Return the options that were given."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    def changed(self, **given: Any) -> Self:
        """Return the recipe of a resumed run, with the changes `given`.

        Raises:
            ValueError: an option must not change in a resumed run; the message names it.
        """
        started = self.resolved()
        for name, value in given.items():
            old = getattr(started, name)
            same = old == value or (name == "precision" and old is None)  # recipes of older versions lack it
            rule = f"stay {'unchanged' if old is None else repr(old)} in a resumed run"
            self.require(name, name in self.changeable or same, rule, self.another, value)
        return dataclasses.replace(self, **given).resolved()

    def assignments(self, config: Any, fixed: Collection[str]) -> dict[str, Any]:
        """Return the changes of ``--set`` to a dataclass, with the types of its fields, except `fixed` ones.

        Raises:
            ValueError: a field does not exist, is given twice or has another type.
        """
        fields = [f.name for f in dataclasses.fields(config) if f.name not in fixed]
        values = {name: getattr(config, name) for name in fields}
        types = {name: str if value is None else type(value) for name, value in values.items()}
        changes: dict[str, Any] = {}
        for assignment in self.set:
            name, _, value = assignment.partition("=")
            self.require("set", name not in changes, f"give {name} once", value=self.set)
            rule = f"be FIELD=VALUE with one of {', '.join(types)}"
            self.require("set", name in types, rule, value=assignment)
            parse = {"True": True, "False": False}.__getitem__ if types[name] is bool else types[name]
            try:
                changes[name] = parse(value)
            except (KeyError, ValueError):
                self.require("set", False, f"have a value of type {types[name].__name__}", value=assignment)
        return changes

    def require(self, name: str, satisfied: bool, rule: str, remedy: str = "", value: Any = None) -> None:
        if not satisfied:
            got = getattr(self, name) if value is None else value
            option = "the task" if name == "task" else f"--{name.replace('_', '-')}"
            raise ValueError(must(f"{self.command}: {option}", rule, repr(got), remedy))


def _is(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the type of a field."""
    if hint == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds += (int,) if float in kinds else ()
    return isinstance(value, kinds) and (isinstance(value, bool) == (bool in kinds))


def add_options(parser, kind: type[Options], names: Collection[str] | None = None) -> None:
    """Add one option per field of `kind` with a help, or only those in `names`.

    The namespace has only the options that are given.
    """
    import argparse

    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if f.metadata["help"] is None or (names is not None and f.name not in names):
            continue
        options: dict[str, Any] = {"help": f.metadata["help"], "default": argparse.SUPPRESS, "dest": f.name}
        if off := f.metadata["off"]:
            options["action"] = "store_true"
            opposite = {"action": "store_false", "default": argparse.SUPPRESS, "dest": f.name}
            either = parser.add_mutually_exclusive_group()
            either.add_argument(off[0], **opposite, help=off[1])
        elif hints[f.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif hints[f.name] == tuple[str, ...]:
            options |= {"nargs": "+", "action": "extend"}  # `--set a=1 --set b=2` is `--set a=1 b=2`
            options["metavar"] = {"set": "FIELD=VALUE", "columns": "NAME"}.get(f.name, "PATH")
        else:
            kinds = (int, float, str)
            options |= {
                "type": next(t for t in kinds if t in (hints[f.name], *typing.get_args(hints[f.name])))
            }
        (either if off else parser).add_argument(f"--{f.name.replace('_', '-')}", **options)
