"""JSON schemas as openai-harmony can show them: `$ref`, `anyOf`, `allOf`, `const` and null
rewritten, comments kept shut.

The library turns a function's parameters into TypeScript and knows object, array, string enums,
type lists, oneOf and nullable; the rest becomes `any`. Everything here only says the same in those
words. What cannot be said stays `any`.
"""

import json
from collections.abc import Mapping
from typing import Any

from gptoss_jax.errors import GptOssError

_MAX_DEPTH = 64


def simplify(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without references and unions that the library does not know; recursion is cut to
    `any`.

    Line breaks in descriptions become spaces, since the library opens a comment only on the first
    line. Raises GptOssError for a reference that leads nowhere, a property name with a line break,
    or nesting deeper than 64.
    """
    return _node(schema, schema, ())


def _node(node: Any, root: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(node, Mapping):  # true and false are schemas too
        return {}
    if len(path) > _MAX_DEPTH:
        raise GptOssError(
            f"a tool's parameters are nested deeper than {_MAX_DEPTH}: make the schema flatter"
        )
    if "$ref" in node:
        return _reference(node, root, path)
    out = {
        key: value
        for key, value in node.items()
        if key not in ("$defs", "definitions", "allOf", "anyOf", "oneOf")
    }
    for member in node.get("allOf", ()):
        _merge(out, _node(member, root, (*path, "allOf")))
    for key in ("description", "title"):
        if isinstance(out.get(key), str):
            out[key] = " ".join(out[key].split())
    variants = node.get("anyOf") or node.get("oneOf")
    if variants:
        _union(out, [_node(variant, root, (*path, "anyOf")) for variant in variants])
    _enum(out)
    if isinstance(out.get("examples"), list):
        out["examples"] = [_one_line(example) for example in out["examples"]]
    if "default" in out:
        out["default"] = _one_line(out["default"])
        if out["default"] is None:  # a parameter that may be left out says as much
            del out["default"]
    if isinstance(out.get("properties"), Mapping):
        for name in out["properties"]:
            if not str(name).isprintable():
                raise GptOssError(f"property name {name!r} is not printable on one line: rename it")
        out["properties"] = {
            name: _node(value, root, (*path, name)) for name, value in out["properties"].items()
        }
    if "items" in out:
        out["items"] = _node(out["items"], root, (*path, "items"))
    return out


def _reference(
    node: Mapping[str, Any], root: Mapping[str, Any], path: tuple[str, ...]
) -> dict[str, Any]:
    pointer = node["$ref"]
    beside = {key: value for key, value in node.items() if key != "$ref"}
    if pointer in path:  # recursive
        return _node(beside, root, path)
    target: Any = root
    parts = pointer.split("/")[1:] if isinstance(pointer, str) and pointer.startswith("#") else None
    for part in [None] if parts is None else parts:
        part = part.replace("~1", "/").replace("~0", "~") if part is not None else None
        if not isinstance(target, Mapping) or part not in target:
            raise GptOssError(
                f"a tool's parameters refer to {pointer!r}, which is not in the schema: use "
                "#/$defs/NAME"
            )
        target = target[part]
    out = _node(target, root, (*path, pointer))
    out.update(_node(beside, root, path))
    return out


def _merge(out: dict[str, Any], member: dict[str, Any]) -> None:
    for key, value in member.items():
        if key == "properties":
            out[key] = {**value, **out.get(key, {})}
        elif key == "required":
            out[key] = [
                *out.get(key, []),
                *(name for name in value if name not in out.get(key, [])),
            ]
        else:
            out.setdefault(key, value)


def _union(out: dict[str, Any], variants: list[dict[str, Any]]) -> None:
    some = [variant for variant in variants if variant.get("type") != "null"]
    null = len(some) < len(variants)
    if len(some) == 1:
        for key, value in some[0].items():
            out.setdefault(key, value)
        if null:
            out["nullable"] = True
    elif some and all(
        set(variant) == {"type"} and isinstance(variant["type"], str) for variant in some
    ):
        out["type"] = [variant["type"] for variant in some] + ["null"] * null
    else:
        # {"type": "null"} alone shows as any, the list of one as null
        out["oneOf"] = some + [{"type": ["null"]}] * null


def _enum(out: dict[str, Any]) -> None:
    if "const" in out:
        out.setdefault("enum", [out.pop("const")])
    values = out.get("enum")
    if not isinstance(values, list):
        return
    if None in values:
        values = [value for value in values if value is not None]
        out["nullable"] = True
    if values and all(isinstance(value, str) for value in values):
        out["enum"] = [json.dumps(value, ensure_ascii=False)[1:-1] for value in values]
        out["type"] = "string"
        return
    del out["enum"]
    if not values:
        return
    kinds = {
        "number" if type(v) in (int, float) else "boolean" if type(v) is bool else "any"
        for v in values
    }
    if kinds <= {"number", "boolean"}:
        out.setdefault("type", sorted(kinds) if len(kinds) > 1 else kinds.pop())
    shown = "One of: " + ", ".join(json.dumps(value, ensure_ascii=False) for value in values)
    out["description"] = f"{out['description']} {shown}" if out.get("description") else shown


def _one_line(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else value
