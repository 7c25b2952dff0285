"""Reading of configurations: YAML files, dotted `key=value` overrides, and messages about mistakes in them."""

import copy
import difflib
import math
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from taid_ray.errors import ConfigError

# Plainer words than pydantic's for what was expected.
EXPECTED = {
    "model_type": "must be a section of keys",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "too_short": "must not be empty",
}

MAX_DEPTH = 32
"""Largest number of parts of a dotted key."""


class StrictLoader(yaml.SafeLoader):
    """Loads YAML as JSON could hold it. Refuses repeated keys, numbers that are not finite, dates, keys that are no text, and
    text that no file can hold.

    An alias stands for a copy, so that an override of one place changes no other.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if alias is None or node is None:
            return node
        if node.end_mark is None:  # not composed to its end yet
            raise yaml.MarkedYAMLError(
                problem=f"the alias *{alias.anchor} refers to a value that contains it", problem_mark=alias.start_mark
            )
        return copy.deepcopy(node)

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        try:
            node.value = whole_text(node.value)
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (first := lines.get((key.tag, key.value))) is not None:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {_shown(key.value)} is given twice (first in line {first}); remove one",
                    problem_mark=key.start_mark,
                )
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node

    def construct_yaml_int(self, node: Any) -> int:
        value = int(super().construct_yaml_int(node))
        if not -(2**63) <= value < 2**63:  # nothing below takes more, and some of it fails late
            raise yaml.MarkedYAMLError(
                problem="a whole number of more than 64 bits; lower it", problem_mark=node.start_mark
            )
        return value

    def construct_yaml_float(self, node: Any) -> float:
        value = float(super().construct_yaml_float(node))
        if not math.isfinite(value):
            raise yaml.MarkedYAMLError(problem=f"{value} is not a finite number", problem_mark=node.start_mark)
        return value

    def construct_yaml_timestamp(self, node: Any) -> Any:
        super().construct_yaml_timestamp(node)
        raise yaml.MarkedYAMLError(
            problem=f"{node.value} is read as a date; put it into quotes if it is meant as text",
            problem_mark=node.start_mark,
        )

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        if other := [key for key in mapping if not isinstance(key, str)]:
            problem = f"the key {_shown(other[0])} is not text; put it into quotes if it is meant as text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return mapping


# A configuration is what JSON can hold too: RUN/config.yaml says the same as what was read.
for _name, _construct in {
    "int": StrictLoader.construct_yaml_int,
    "float": StrictLoader.construct_yaml_float,
    "timestamp": StrictLoader.construct_yaml_timestamp,
    **dict.fromkeys(("binary", "omap", "pairs", "set"), StrictLoader.construct_undefined),
}.items():
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{_name}", _construct)


def whole_text(text: str) -> str:
    """Joins the halves of characters that JSON writes as two escapes. Raises ValueError for a lone half or a NUL."""
    try:
        whole = text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        whole = "\0"
    if "\0" in whole:
        raise ValueError(f"{_shown(text)} holds half a character or a NUL, which no text file can; remove it")
    return whole


def parse_yaml(text: str) -> Any:
    """Returns the plain Python value of a YAML text. Raises YAMLError."""
    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except Exception as error:  # PyYAML lets pass whatever it meets in 2025-02-30, `!!bool maybe`, `!!timestamp x`, ...
        raise yaml.YAMLError(f"a value does not fit its type ({type(error).__name__}: {error})") from error


def read_tree(path: str | Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file. Raises ConfigError, naming the file, if there is none."""
    path = Path(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Name an existing YAML configuration.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory. Name the YAML file in it.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file. Name a YAML configuration.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Name a readable YAML configuration.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_fault(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections (teacher, student, data, ...), found {_shown(tree)}")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets what a dotted `key=value` says, its value read as YAML. Raises ConfigError if it cannot be read."""
    try:  # bytes of a command line that are not UTF-8 arrive as halves of characters
        key, equals, text = whole_text(override).partition("=")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise ConfigError(f"{_shown(override)} is not of the form key=value, for example schedule.t_start=0.3")
    try:
        value = text if text.startswith(("{{", "{%")) else parse_yaml(text)  # Jinja is never YAML
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{_named(key)}: the value {_shown(text)} is not valid YAML ({_fault(error)}). "
            f"If it is meant as text, put it into double quotes inside the shell's: '{_named(key)}=\"...\"'"
        ) from None
    set_key(tree, key, value)


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key and makes the sections on the way, also in place of null. Raises ConfigError if one is a value."""
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{_named(key)}: {_shown(section)} is a value ({_shown(child)}), not a section")
        node = child
    node[last] = value


CREDENTIALS = "must not hold credentials"


def explain(problem: Any, known_keys: Iterable[str]) -> str:
    """Says one pydantic problem in one line: dotted key, what is wrong, what was found, what to do."""
    # A part such as `list[str]` names the alternative of a union that was tried, and no key.
    location: list[str] = []
    for part in problem["loc"]:
        if isinstance(part, int) and location:  # of a list
            location[-1] += f"[{part}]"
        elif "[" not in str(part):
            location.append(str(part))
    key, found = _named(".".join(location)), _shown(problem["input"])
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key (found {found}). {_nearest(location, sorted(known_keys))}"
    if problem["type"] == "missing":
        return f"{key}: missing. Add it to the configuration."
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = EXPECTED.get(problem["type"], message)
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return message if key in message else f"{key}: {message}"
    # What holds a secret is not shown.
    if CREDENTIALS in message:
        return f"{key}: {message}"
    return f"{key}: {message} (found {found}){_nearest_choice(problem)}"


def _nearest(location: list[str], known: list[str]) -> str:
    """Suggests the known key or section closest to an unknown one: the same word in another section comes first."""
    section, _, word = re.sub(r"\[\d+\]", "[]", ".".join(location)).rpartition(".")
    word = word[:80]  # difflib takes seconds for pages
    sections = sorted({k.rpartition(".")[0] for k in known} - {""})
    elsewhere = [k for k in known if k.rpartition(".")[2] == word]
    elsewhere.sort(key=lambda k: not k.endswith(f".{section}.{word}"))
    here = {k.rpartition(".")[2]: k for k in [*known, *sections] if k.rpartition(".")[0] == section}
    close = [here[match] for match in difflib.get_close_matches(word, here, n=1, cutoff=0.6)]
    similar = [k for k in known if difflib.get_close_matches(word, [k.rpartition(".")[2]], cutoff=0.8)]
    if suggestions := elsewhere or close or similar:
        return f"Did you mean {suggestions[0]}?"
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    return f"Known keys here: {', '.join(siblings if section else [*siblings, *sections])}."


def _nearest_choice(problem: Any) -> str:
    """Suggests the closest of the values that a key may have; nothing where none is close, or where any value may be right."""
    if problem["type"] != "literal_error":
        return ""
    choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    close = difflib.get_close_matches(str(problem["input"])[:80].lower(), choices, n=1, cutoff=0.5)
    return f". Did you mean {close[0]}?" if close else ""


def _fault(error: yaml.YAMLError) -> str:
    """Says in one line what is wrong with a YAML text, and where."""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    mark = getattr(error, "problem_mark", None)
    text = " ".join(str(problem).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {text}" if mark else text


def _named(key: str) -> str:
    """Shows a key in one line of reasonable length."""
    text = key if key.isprintable() else repr(key)
    return text if len(text) <= 120 else text[:117] + "..."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
