"""The reference of all configuration keys, written from the fields of taid_ray/config/schema.py, so it cannot fall behind."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from taid_ray.config.schema import DistillConfig, Range, Section
from taid_ray.config.space import SHARED
from taid_ray.run.directory import MAY_CHANGE

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
    top = {name: field for name, field in DistillConfig.model_fields.items() if section_of(field) is None}
    parts = ["## The run", *(_key(name, field) for name, field in top.items())]
    for name, field in DistillConfig.model_fields.items():
        if (section := section_of(field)) is not None:
            parts += [f"## {name}", *_section(section, f"{name}.")]
    return "\n\n".join(parts)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field stands for; a Range is none, because a number may be written for it."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section) and kind is not Range:
            return kind
    return None


def _section(section: type[Section], prefix: str) -> list[str]:
    about = [" ".join(section.__doc__.split())] if section.__doc__ else []
    return about + [part for name, field in section.model_fields.items() for part in _entries(prefix + name, field)]


def _entries(key: str, field: FieldInfo) -> list[str]:
    inner = section_of(field)
    return [_key(key, field), *(_section(inner, f"{key}.") if inner else [])]


def _key(key: str, field: FieldInfo) -> str:
    """One key: heading, help, and a line of facts."""
    default = "required" if field.is_required() else f"default `{_shown(field.get_default(call_default_factory=True))}`"
    facts = [_type(field.annotation, field.metadata), default]
    facts += ["may change on resume"] if _may_change(key) else []
    facts += ["may be searched"] if _may_be_searched(key) else []
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


def _may_change(key: str) -> bool:
    return any(f"{key}.".startswith(f"{free}.") for free in MAY_CHANGE)


def _may_be_searched(key: str) -> bool:
    return not any(key == shared or (shared.endswith(".") and key.startswith(shared)) for shared in SHARED)
