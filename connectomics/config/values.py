"""Dataclasses to plain values and back, checked by pydantic: one way for every file that stores one.

A dataclass states its rules in its annotations (``Annotated[int, Field(ge=1)]``, ``Annotated[str, one_of(...)]``) or
in ``__post_init__``; `read` and `plain` do the rest.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from connectomics.errors import ConnectomicsError, MetadataError, nearest

T = TypeVar("T")

#: Put into a dataclass as ``__pydantic_config__``: unknown keys are refused, numbers are finite, and text fields also
#: take numbers (``crops: [234]``).
STRICT_KEYS = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)


class Group:
    """Base class of all groups of a configuration."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_KEYS

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, ``default`` if there is no such key."""
        return getattr(self, key, default) if key in getattr(self, "__dataclass_fields__", ()) else default


#: How pydantic's words for common rules read in our messages; the rest keeps its own words.
_RULES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "finite_number": "must be a finite number",
}


def one_of(*words: str) -> AfterValidator:
    """Annotation for a text field that must be one of ``words``; the message suggests the nearest word."""

    def check(value: str) -> str:
        if value not in words:
            near = nearest(value, words)
            hint = f"; did you mean {near!r}?" if near else ""
            raise PydanticCustomError("one_of", "must be one of {words}", {"words": ", ".join(words), "hint": hint})
        return value

    return AfterValidator(check)


def checked(rule: Callable[[Any], bool], message: str) -> AfterValidator:
    """Annotation for a field whose value must satisfy ``rule``; ``message`` completes "<key> ..." ("must be ...")."""

    def check(value: Any) -> Any:
        if not rule(value):
            raise ValueError(message)
        return value

    return AfterValidator(check)


_THREE = checked(
    lambda value: isinstance(value, Sequence) and len(value) == 3 and all(0 < n < math.inf for n in value),
    "must be three positive numbers (z, y, x)",
)
Size = Annotated[list[float], _THREE]  # nm, z y x
Shape = Annotated[list[int], _THREE]  # voxels, z y x


def read(
    kind: type[T], data: Mapping[str, Any], where: str, error: type[ConnectomicsError] = MetadataError, prefix: str = ""
) -> T:
    """Return the dataclass ``kind`` with the values of ``data``, nested dataclasses included.

    Args:
        kind: a dataclass. data: its fields by name, as JSON or YAML give them; absent fields take their defaults.
        where: what was read, for the message (a path). prefix: put before the key in the message.

    Raises:
        error: a key is unknown or missing, or a value has the wrong type or breaks a rule; one line that names
            ``where`` and the key. Errors of this package that ``__post_init__`` raises pass through.
    """
    _refuse_unknown(kind, data, where, error, prefix)
    try:
        value: T = _adapter(kind).validate_python(data)  # type: ignore[arg-type]  # a class is hashable
        return value
    except ValidationError as found:
        raise error(f"{where}: {_one_line(found, prefix)}") from found


def plain(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON gives them: nested dicts, lists, numbers, text."""
    fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(value), default=_plain_item))
    return fields


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested mappings as one level: ``{"data": {"patch_size": 3}}`` becomes ``{"data.patch_size": 3}``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def _plain_item(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") else list(value)  # numpy's numbers and arrays; sets


@lru_cache(maxsize=256)
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _refuse_unknown(kind: type[Any], data: Any, where: str, error: type[ConnectomicsError], prefix: str) -> None:
    known = [entry.name for entry in dataclasses.fields(kind) if entry.init]
    if not isinstance(data, Mapping):
        raise error(f"{where}: {prefix.rstrip('.') or 'the content'} must be keys and values, got {data!r}")
    for name in data:
        if name not in known:
            near = nearest(str(name), known)
            hint = f"; did you mean {prefix + near!r}?" if near else f"; known keys: {', '.join(known)}"
            raise error(f"{where}: unknown key {prefix + str(name)!r}{hint}")


def _one_line(found: ValidationError, prefix: str) -> str:
    """The first of pydantic's complaints as "<key> <rule>, got <value>"."""
    first = found.errors(include_url=False)[0]
    key = prefix + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key!r}"
    about = first.get("ctx", {})
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = _RULES.get(first["type"], message).format(**about)
    if first["type"] == "value_error" and ", got " in message:
        return message if message.startswith(key) else f"{key}: {message}"
    return f"{key} {message}, got {first['input']!r}{about.get('hint', '')}"
