"""The page of all settings, written from the JSON schema of a run."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).parents[1] / "configs" / "schema.json"
HEAD = """# All settings

Generated from `configs/schema.json`. A setting is written as YAML, or on the command line by its dotted name: `train.epochs=3`. `python tools/train.py CONFIG --print-config` prints every setting of a run with its value and where that came from. What is left out has the default; `required` has none.
"""  # noqa: E501

Schema = Mapping[str, Any]


def write(path: Path) -> None:
    """Write the page, unless it is there already as it should be: a new date would rebuild the site."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    text = HEAD + "".join(_section("Run", "", schema, schema["$defs"], set()))
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _section(title: str, path: str, schema: Schema, defs: Schema, written: set[str]) -> Iterator[str]:
    """One table of settings, and the sections of the settings that have settings themselves; each is written once."""
    written.add(title)
    yield f"\n## {title}\n\n" + (f"`{path}`. " if path else "") + _sentence(schema.get("description", "")) + "\n"
    rows, below = [], []
    for name, setting in schema.get("properties", {}).items():
        if name == "type" and "const" in setting:  # it stands in the section's title
            continue
        inner = [_resolved(choice, defs) for choice in _choices(setting)]
        groups = [choice for choice in inner if {"title", "properties"} <= choice.keys()]
        below += [(choice, f"{path}.{name}" if path else name) for choice in groups]
        default = _default(setting, bool(groups))
        rows.append(
            f"| `{name}` | {_type(setting, defs)} | {default} | {_sentence(setting.get('description', ''))} |\n"
        )
    if rows:
        yield "\n| setting | value | default | meaning |\n|---|---|---|---|\n" + "".join(rows)
    for choice, where in below:
        if _title(choice) not in written:
            yield from _section(_title(choice), where, choice, defs, written)


def _resolved(schema: Schema, defs: Schema) -> Schema:
    return defs[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _choices(schema: Schema) -> Iterator[Schema]:
    """What a value may be, through unions, lists and mappings."""
    if "anyOf" in schema or "oneOf" in schema:
        for choice in schema.get("anyOf", schema.get("oneOf")):
            yield from _choices(choice)
    elif schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        yield from _choices(schema["items"])
    elif isinstance(schema.get("additionalProperties"), dict):
        yield from _choices(schema["additionalProperties"])
    else:
        yield schema


def _title(schema: Schema) -> str:
    """The class of the settings, with the `type:` that chooses it."""
    kind = schema["properties"].get("type", {}).get("const")
    return f"{schema['title']}: type {kind}" if kind else str(schema["title"])


def _type(schema: Schema, defs: Schema) -> str:
    if "$ref" in schema:
        return _link(_resolved(schema, defs))
    if "anyOf" in schema or "oneOf" in schema:
        choices = schema.get("anyOf", schema.get("oneOf"))
        types = {_resolved(choice, defs).get("properties", {}).get("type", {}).get("const") for choice in choices}
        # a type may stand by its name alone, with all its settings at their defaults
        texts = [
            _type(choice, defs)
            for choice in choices
            if not {choice.get("const"), *choice.get("enum", ())} & types - {None}
        ]
        return " or ".join(dict.fromkeys(texts))
    if "const" in schema:
        return _code(schema["const"])
    if "enum" in schema:
        return " or ".join(map(_code, schema["enum"]))
    if "title" in schema and "properties" in schema:
        return _link(schema)
    if "properties" in schema:  # a plug-in by its dotted path
        return "yours"
    if schema.get("type") == "array":
        items = schema.get("items", schema.get("prefixItems"))
        if isinstance(items, dict):
            return f"list of {_type(items, defs)}"
        return "[" + ", ".join(_type(item, defs) for item in items or ()) + "]"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"{{name: {_type(schema['additionalProperties'], defs)}}}"
    return {"null": "unset", "object": "mapping"}.get(schema.get("type", "any"), schema.get("type", "any")) + _limits(
        schema
    )


def _default(setting: Schema, has_section: bool) -> str:
    """required, a value, or the type whose defaults are in its own section."""
    if "default" not in setting:
        return "see there" if has_section else "none" if setting.get("type") == "object" else "required"
    default = setting["default"]
    if isinstance(default, dict) and has_section:
        return f"`{default['type']}`" if "type" in default else "see there" if default else "none"
    return _code(default)


def _link(schema: Schema) -> str:
    title = _title(schema)
    anchor = "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
    return f"[{schema['title'] if ': ' not in title else title.rpartition(' ')[2]}](#{anchor})"


def _limits(schema: Schema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]}" for name, sign in signs.items() if name in schema]
    return f" {', '.join(limits)}" if limits else ""


def _code(value: object) -> str:
    text = "unset" if value is None else json.dumps(value)
    return text if value is None else f"`{text}`".replace("|", "\\|")


def _sentence(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
