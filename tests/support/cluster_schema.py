"""Validates objects against custom resource definitions, as strictly as `kubectl --validate=strict`, without a cluster.

The definitions are read from a directory with KubeRay's own files (ray-operator/config/crd/bases). Rules in CEL are left out.
"""

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

KEPT = {
    "type", "enum", "required", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems",
    "maxProperties", "pattern",
}  # fmt: skip
INT_OR_STRING = {"anyOf": [{"type": "integer"}, {"type": "string"}]}


def complaints(found: dict[str, Any], directory: Path) -> list[str]:
    """What the definition of the object's kind says against it: path and message of each, none if it is valid."""
    schema = definitions(directory)[found["kind"], found["apiVersion"]]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(found)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


@cache
def definitions(directory: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """JSON schemas by kind and apiVersion (`ray.io/v1`)."""
    schemas = {}
    for path in directory.glob("*.yaml"):
        definition = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in definition["versions"]:
            api = f"{definition['group']}/{version['name']}"
            schemas[definition["names"]["kind"], api] = _plain(version["schema"]["openAPIV3Schema"])
    for schema in schemas.values():
        schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which definitions leave open
    return schemas


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A Kubernetes structural schema as JSON Schema; fields it does not name are refused."""
    if schema.get("x-kubernetes-int-or-string"):
        return INT_OR_STRING
    plain: dict[str, Any] = {key: value for key, value in schema.items() if key in KEPT}
    if schema.get("nullable"):
        plain["type"] = [plain["type"], "null"]
    if "items" in schema:
        plain["items"] = _plain(schema["items"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            plain[key] = [_plain(part) for part in schema[key]]
    others = schema.get("additionalProperties")
    if isinstance(others, dict):
        plain["additionalProperties"] = _plain(others)
    if "properties" in schema:
        plain["properties"] = {key: _plain(part) for key, part in schema["properties"].items()}
        if others is None and not schema.get("x-kubernetes-preserve-unknown-fields"):
            plain["additionalProperties"] = False
    return plain
