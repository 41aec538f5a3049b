"""Hold KServe's objects to schemas that are made of KServe's own models.

    .venv-k8s/bin/python k8s/schemas/kserve.py FILE…              # what k8s/lint.py runs

``kserve.json`` was made by:

    pip install --no-deps --target build/kserve kserve==0.21.0
    .venv/bin/python k8s/schemas/kserve.py --make build/kserve > k8s/schemas/kserve.json

The models are generated from the Go types that the CRDs are generated from, so names, types and what is
required agree with the CRDs. Patterns, ranges and rules of the CRDs (x-kubernetes-validations), and what
KServe's webhooks say, are not there.
"""

import importlib
import importlib.metadata
import json
import re
import sys
import types
from pathlib import Path
from typing import Any, Final

SCHEMAS: Final = Path(__file__).with_suffix(".json")
KINDS: Final = {
    ("serving.kserve.io/v1alpha1", "ServingRuntime"): "V1alpha1ServingRuntime",
    ("serving.kserve.io/v1beta1", "InferenceService"): "V1beta1InferenceService",
}
_PLAIN: Final[dict[str, dict[str, Any]]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "object": {},
    "datetime": {"type": "string"},
    "IntOrString": {"type": ["integer", "string"]},
    "ResourceQuantity": {"type": ["string", "number"]},
}
_RENAMED: Final = {"K8sIoApiAppsV1DeploymentStrategy": "V1DeploymentStrategy"}


def make(folder: Path) -> dict[str, Any]:
    """The schemas, of the package kserve in `folder` and the installed package kubernetes."""
    # Without the package's own __init__, which imports a whole server.
    for name in ("kserve", "kserve.models"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder / name.replace(".", "/"))]
    found: dict[str, Any] = {}
    waiting = [*KINDS.values()]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        model = _model(name)
        if model is None:
            print(f"{name}: no model; anything goes", file=sys.stderr)
            found[name] = {}
            continue
        properties: dict[str, Any] = {}
        for attribute, kind in model.openapi_types.items():
            if attribute == "status":  # the controller's
                continue
            properties[model.attribute_map[attribute]] = _schema(kind, waiting)
        required = [model.attribute_map[one] for one in model.openapi_types if _is_required(model, one)]
        found[name] = {"type": "object", "additionalProperties": False, "properties": properties}
        if required:
            found[name]["required"] = required
    (kserve,) = folder.glob("kserve-*.dist-info")
    return {
        "$comment": f"Made by kserve.py of PyPI's {kserve.stem} (The KServe Authors) and kubernetes "
        f"{importlib.metadata.version('kubernetes')} (The Kubernetes Authors), both under the Apache "
        "License 2.0.",
        "$defs": dict(sorted(found.items())),
    }


def _model(name: str) -> Any:
    """The class of that name, or None."""
    name = _RENAMED.get(name, name)
    module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    module = re.sub(r"^v1_?(alpha|beta)_?(\d)", r"v1\1\2", module)
    for package in ("kserve.models", "kubernetes.client.models"):
        try:
            return getattr(importlib.import_module(f"{package}.{module}"), name)
        except ImportError:
            continue
    import kubernetes.client

    return getattr(kubernetes.client, name, None)


def _schema(kind: str, waiting: list[str]) -> dict[str, Any]:
    if kind[:5] in ("list[", "List["):
        return {"type": "array", "items": _schema(kind[5:-1], waiting)}
    if kind[:5] in ("dict(", "Dict["):
        return {"type": "object", "additionalProperties": _schema(kind[5:-1].split(", ", 1)[1], waiting)}
    if kind in _PLAIN:
        return _PLAIN[kind]
    waiting.append(kind)
    return {"$ref": f"#/$defs/{kind}"}


def _is_required(model: Any, attribute: str) -> bool:
    """Its field has no default, or (in KServe's older way) its setter refuses None."""
    if hasattr(model, "model_fields"):
        field = model.model_fields.get(attribute)
        return field is not None and bool(field.is_required())
    code = getattr(model, attribute).fset.__code__
    return any("must not be `None`" in str(constant) for constant in code.co_consts)


def faults(text: str) -> list[str]:
    """What the schemas say against each object of a YAML text."""
    import jsonschema
    import yaml

    schemas = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    said = []
    for one in yaml.safe_load_all(text):
        kind = (one.get("apiVersion"), one.get("kind"))
        where = f"{kind[1]} {one.get('metadata', {}).get('name')}"
        if kind not in KINDS:
            said.append(f"{where}: no schema for {kind[0]}")
            continue
        schema = {"$ref": f"#/$defs/{KINDS[kind]}", "$defs": schemas["$defs"]}
        errors = jsonschema.Draft202012Validator(schema).iter_errors(one)
        said += [f"{where}: {error.json_path}: {error.message}" for error in errors]
    return said


def main() -> int:
    """Print what is wrong; the exit code."""
    if sys.argv[1] == "--make":
        made = make(Path(sys.argv[2]))
        definitions = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in made["$defs"].items())
        print(f'{{"$comment": {json.dumps(made["$comment"])},\n"$defs": {{\n{definitions}\n}}}}')
        return 0
    texts = {path: Path(path).read_text(encoding="utf-8") for path in sys.argv[1:]}
    said = [f"{path}: {one}" for path, text in texts.items() for one in faults(text)]
    print("\n".join(said))
    return bool(said)


if __name__ == "__main__":
    sys.exit(main())
