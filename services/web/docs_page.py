"""The page of the API, made from its OpenAPI description: no script, and no request to another machine."""

import html
from collections.abc import Iterator, Mapping
from typing import Any, Final

_STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font: 600 1.1rem ui-monospace, monospace; border-top: 1px solid #8886; padding-top: 1rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top;
padding: .25rem .75rem .25rem 0; } code { font-family: ui-monospace, monospace; }
"""


def docs_page(description: Mapping[str, Any]) -> str:
    """Return HTML for an OpenAPI description."""
    info = description["info"]
    body = "".join(
        _operation(path, method, operation, description)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{_text(info['title'])}</title><style>{_STYLE}</style>"
        f"<h1>{_text(info['title'])} {_text(info['version'])}</h1><p>{_text(info['description'])}</p>"
        f"<p>For programs: <a href=openapi.json>openapi.json</a></p>{body}</html>"
    )


def _operation(path: str, method: str, operation: Mapping[str, Any], description: Mapping[str, Any]) -> str:
    rows = [
        (
            parameter["name"],
            f"{_kind(parameter['schema'])}, in the query",
            False,
            parameter.get("description", ""),
        )
        for parameter in operation.get("parameters", ())
    ]
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        rows += _fields(content["application/json"]["schema"], description)
    table = "".join(
        f"<tr><td><code>{_text(name)}</code><td>{_text(kind)}{', required' if required else ''}"
        f"<td>{_text(text)}"
        for name, kind, required, text in rows
    )
    fields = f"<table><tr><th>Field<th>Type<th>Meaning{table}</table>" if rows else ""
    text = operation.get("description") or operation.get("summary", "")
    return f"<h2>{method.upper()} {_text(path)}</h2><p>{_text(text)}</p>{fields}"


def _fields(
    schema: Mapping[str, Any], description: Mapping[str, Any]
) -> Iterator[tuple[str, str, bool, str]]:
    if "$ref" in schema:
        schema = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for name, field in schema.get("properties", {}).items():
        yield name, _kind(field), name in schema.get("required", ()), field.get("description", "")


def _kind(field: Mapping[str, Any]) -> str:
    """Return a short name of a field's type."""
    if "anyOf" in field:
        return " or ".join(_kind(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "items" in field:
        return f"list of {_kind(field['items'])}"
    return str(field.get("type") or field.get("$ref", "").rpartition("/")[2] or "any")


def _text(text: str) -> str:
    return html.escape(" ".join(text.split()))
