"""Plain resolved config data <-> frozen dataclasses, strictly: what is unknown, missing or of a wrong type is named."""

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def from_mapping(cls: type[T], mapping: object, path: str = "") -> T:
    """Build dataclass `cls` from `mapping`.

    Fields may be bool, int, float, str, None, Literal, unions of these, tuples, mappings and nested dataclasses
    (an instance of which is taken as it is). An int is taken where a float is wanted, NaN and infinity are not.
    Raises ValueError with the dotted path of the offending key.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{path or 'config'} must be a group of keys, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            raise ValueError(f"unknown key {_join(path, str(key))}; known keys: {', '.join(sorted(fields))}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"missing key {_join(path, name)} ({_describe(hints[name])})")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error


def to_mapping(config: Any) -> dict[str, Any]:
    """Return dataclass `config` as plain data that YAML and JSON can hold; `from_mapping` reads it back."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, path)  # type: ignore[arg-type]
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, arguments, value, path)
    if origin is typing.Literal:
        if value in arguments and any(type(value) is type(argument) for argument in arguments):
            return value
    elif origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        return _convert_tuple(hint, arguments, value, path)
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        return {
            _convert(arguments[0], k, f"{path} (key)"): _convert(arguments[1], v, _join(path, str(k)))
            for k, v in value.items()
        }
    elif hint is float:
        # The bound refuses NaN, infinity, and whole numbers that float() cannot take.
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{path} must be {_describe(hint)}, got {value!r}")


def _convert_union(hint: Any, arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [argument for argument in arguments if argument is not type(None)]
    if len(choices) == 1:
        return _convert(choices[0], value, path)
    for choice in choices:
        try:
            return _convert(choice, value, path)
        except ValueError:
            continue
    raise ValueError(f"{path} must be {_describe(hint)}, got {value!r}")


def _convert_tuple(hint: Any, arguments: tuple[Any, ...], value: Sequence[Any], path: str) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise ValueError(f"{path} must be {_describe(hint)}, got {list(value)!r}")
    return tuple(_convert(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(arguments, value)))


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "a group of keys"
    if origin is typing.Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is tuple:
        return "a list of " + _describe(arguments[0])
    if origin in (dict, Mapping):
        return "a group of names with " + _describe(arguments[1])
    names = {object: "anything", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint, str(hint))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def parse_bytes(text: str, key: str) -> int:
    """Return the number that `text`, with a unit or without, stands for; ValueError naming `key` where it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{key} must be a number, with a unit if wanted (2GB, 1.5GiB), got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])
