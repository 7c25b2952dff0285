"""Builds the kustomizations under cluster/kuberay without kustomize: the part of it that they use, anything else is refused.

Where kustomize itself is at hand, the tests compare the two.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonpatch import apply_patch

Object = dict[str, Any]


def build(directory: Path) -> list[Object]:
    """The objects that `kubectl kustomize DIRECTORY` prints, sorted by kind."""
    return sorted(_applied(directory, []), key=lambda found: found["kind"])


def documents(path: Path) -> list[Any]:
    """Of a YAML file; what an anchor names twice is two things, so that a patch of one leaves the other."""
    return json.loads(json.dumps(list(yaml.safe_load_all(path.read_text(encoding="utf-8")))))


def _applied(directory: Path, objects: list[Object]) -> list[Object]:
    """What a kustomization, or a component applied to `objects`, makes of them. In kustomize's own order of fields."""
    [wanted] = documents(directory / "kustomization.yaml")
    unknown = wanted.keys() - {"apiVersion", "kind", "resources", "components", *STEPS}
    if unknown:
        raise NotImplementedError(f"{directory}/kustomization.yaml: {sorted(unknown)} is not known here")
    for name in wanted.get("resources", []):
        path = directory / name
        objects = objects + (_applied(path, []) if path.is_dir() else documents(path))
    for name in wanted.get("components", []):
        objects = _applied(directory / name, objects)
    for key, step in STEPS.items():
        if key in wanted:
            objects = step(objects, wanted[key], directory)
    return objects


def _patched(objects: list[Object], patches: list[Object], directory: Path) -> list[Object]:
    for patch in patches:
        text = patch["patch"] if "patch" in patch else (directory / patch["path"]).read_text(encoding="utf-8")
        operations, kinds = yaml.safe_load(text), patch["target"]["kind"].split("|")
        if patch["target"].keys() != {"kind"}:
            raise NotImplementedError(f"{directory}: a target other than a kind ({patch['target']})")
        if isinstance(operations, list):
            objects = [apply_patch(found, operations) if found["kind"] in kinds else found for found in objects]
        elif operations.get("$patch") == "delete":
            objects = [found for found in objects if found["kind"] not in kinds]
        else:
            raise NotImplementedError(f"{directory}: a patch that is neither JSON 6902 nor a removal")
    return objects


def _suffixed(objects: list[Object], suffix: str, directory: Path) -> list[Object]:
    return [found | {"metadata": found["metadata"] | {"name": found["metadata"]["name"] + suffix}} for found in objects]


def _retagged(objects: list[Object], images: list[Object], directory: Path) -> list[Object]:
    tags = {image["name"]: image["newTag"] for image in images}

    def visited(found: Any) -> Any:
        if isinstance(found, list):
            return [visited(part) for part in found]
        if not isinstance(found, dict):
            return found
        name = str(found.get("image", "")).partition(":")[0]
        changed = {"image": f"{name}:{tags[name]}"} if name in tags else {}
        return {key: visited(part) for key, part in found.items()} | changed

    return [visited(found) for found in objects]


def _replaced(objects: list[Object], replacements: list[Object], directory: Path) -> list[Object]:
    for replacement in replacements:
        source = replacement["source"]
        [value] = [_at(found, source["fieldPath"]) for found in objects if found["kind"] == source["kind"]]
        for target in replacement["targets"]:
            for found in (found for found in objects if found["kind"] == target["select"]["kind"]):
                for path in target["fieldPaths"]:
                    parent, _, key = path.rpartition(".")
                    _at(found, parent)[key] = value
    return objects


def _at(found: Object, path: str) -> Any:
    for key in path.split("."):
        found = found[key]
    return found


STEPS: dict[str, Callable[[list[Object], Any, Path], list[Object]]] = {
    "patches": _patched,
    "nameSuffix": _suffixed,
    "images": _retagged,
    "replacements": _replaced,
}
"""Fields of a kustomization that change objects, in the order in which kustomize applies them."""
