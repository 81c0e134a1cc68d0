"""Recipe, then YAML file, then flags: each layer overrides the one before."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ppomax.config.schema import Schema, laid_over
from ppomax.errors import SetupError

C = TypeVar("C", bound=Schema)


class _Once(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error: of two `optim:` groups the first would count for nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                problem = f"found the key '{key.value}' twice, expected it once"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def overlay(base: C, values: dict[str, Any], *, origin: str) -> C:
    """`base` with nested `values` laid over it; an unknown key is an error that names the nearest known one.

    origin: where the values come from, for the message (a file name, a recipe).
    """
    _refuse_unknown(type(base), values, origin, prefix="")
    try:
        return type(base).model_validate(laid_over(base, values))
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})" for e in error.errors()]
        raise SetupError(f"{origin}: not a valid {type(base).__name__}:\n" + "\n".join(lines)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Once)
    except OSError as error:
        raise SetupError(f"{path}: cannot be read ({error.strerror}), expected a YAML file of settings") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise SetupError(f"{path}: found {found}, expected settings, one a line: `key: value`")
    return values


def plain(config: BaseModel) -> dict[str, Any]:
    """The configuration as nested dicts of JSON values."""
    return config.model_dump(mode="json")


def nearest(word: str, known: list[str]) -> str:
    """The end of a sentence about an unknown word: "; did you mean 'X'?" with the closest known one, else "."."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "."


def _refuse_unknown(schema: type[BaseModel], values: dict[str, Any], origin: str, prefix: str) -> None:
    known = list(schema.model_fields)
    for key, value in values.items():
        if key not in known:
            raise SetupError(
                f"{origin}: unknown key '{prefix}{key}'{nearest(str(key), known)} Known here: {', '.join(known)}"
            )
        child = schema.model_fields[key].annotation
        if not (isinstance(child, type) and issubclass(child, BaseModel)):
            continue
        if not isinstance(value, dict | BaseModel):
            inside = ", ".join(child.model_fields)
            raise SetupError(f"{origin}: {prefix}{key}: found {value!r}, expected settings of its own: {inside}")
        if isinstance(value, dict):
            _refuse_unknown(child, value, origin, prefix=f"{prefix}{key}.")
