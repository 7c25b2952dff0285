"""The reference of all configuration keys, written from the fields of taid_ray/config/, so it cannot fall behind."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from taid_ray.config.fields import MOVABLE, RESUMABLE, Range, Section, SharedByTrials
from taid_ray.config.schema import DistillConfig, items_of, marks_of, section_of

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "length at least"}
NAMES = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "`true` | `false`",
    dict: "mapping",
    Range: "whole number or `{min: A, max: B}`",
}


def key_reference() -> str:
    """The reference of all configuration keys as Markdown: a heading per section, below it a heading per key."""
    fields = DistillConfig.model_fields
    parts = ["## The run", *(_key(name, field) for name, field in fields.items() if section_of(field) is None)]
    for name, field in fields.items():
        if (section := section_of(field)) is not None:
            own = [_key(name, field)] if field.description else []  # it may be null
            parts += [f"## {name}", *own, *_section(section, f"{name}.")]
    return "\n\n".join(parts)


def _section(section: type[Section], prefix: str) -> list[str]:
    about = [" ".join(section.__doc__.split())] if section.__doc__ else []
    return about + [part for name, field in section.model_fields.items() for part in _entries(prefix + name, field)]


def _entries(key: str, field: FieldInfo) -> list[str]:
    inner = section_of(field)
    if (items := items_of(field)) is not None:
        return [_key(key, field), *_section(items, f"{key}[].")]
    below = [] if inner in (None, Range) else _section(inner, f"{key}.")  # of a range, a number may be given instead
    return [_key(key, field), *below]


def _key(key: str, field: FieldInfo) -> str:
    """One key: heading, help, and a line of facts."""
    default = "required" if field.is_required() else f"default `{_shown(field.get_default(call_default_factory=True))}`"
    facts = [_type(field.annotation, field.metadata), default]
    marks = marks_of(key)
    facts += ["may change on resume"] if RESUMABLE in marks else []
    facts += ["the path may change on resume"] if MOVABLE in marks else []
    fixed = "[]" in key or any(
        isinstance(mark, SharedByTrials) for mark in marks
    )  # of a list, only the whole is searched
    facts += [] if fixed else ["may be searched"]
    return (
        f"### {key} {{ #{key} }}\n\n{' '.join((field.description or '').split())}\n\n{' · '.join(facts)}\n{{ .facts }}"
    )


def _type(kind: Any, metadata: list[Any]) -> str:
    """A type in words: its choices, or its name with its bounds."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return " | ".join(f"`{_shown(choice)}`" for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join("`null`" if part is NoneType else _type(part, metadata) for part in arguments)
    return _name(kind, origin, arguments) + _bounds(metadata)


def _name(kind: Any, origin: Any, arguments: tuple[Any, ...]) -> str:
    if origin is list:
        return f"list of {_type(arguments[0], [])}"
    if origin is tuple:
        return "[" + ", ".join(_type(argument, []) for argument in arguments) + "]"
    return NAMES.get(origin or kind, "section")


def _bounds(metadata: list[Any]) -> str:
    flat = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    bounds = [f"{word} {getattr(item, name)}" for item in flat for name, word in BOUNDS.items() if hasattr(item, name)]
    return f" ({', '.join(bounds)})" if bounds else ""


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, Range):
        value = value.model_dump()
    return str(yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)).split("\n")[
        0
    ]
