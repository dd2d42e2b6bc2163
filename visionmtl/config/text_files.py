"""Text, JSON and YAML files that people and programs wrote, as plain data: limits, and errors that name the file.

Whatever a file holds, reading it ends in plain data (dict, list, str, int, float, bool, None) or in a ValueError in
three parts. Nothing in it is run, no name in it is imported, no variable of the environment is read.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from visionmtl.config.paths import regular_file

MAX_YAML_BYTES = 1_000_000
MAX_TEXT_BYTES = 256_000_000
MAX_JSON_BYTES = 4_000_000_000
"""Full COCO's largest file has 450 MB, and its parsed form ten times that."""
MAX_DEPTH = 64
"""Mappings and lists inside each other, in YAML files and in JSON files of our own."""
MAX_NODES = 50_000
"""Values of a YAML file, those behind aliases counted each time."""
_MAX_NUMBER = 400
"""Characters of a number in YAML: Python takes quadratic time for long ones, and cannot print them."""
_REWRITE = "use a file that visionmtl wrote, or have it written again"


def read_bytes(file: Path, max_bytes: int, what: str) -> bytes:
    """The content of a regular file. what: is needed, for messages. Raises ValueError for what cannot be read."""
    try:
        size = regular_file(file).stat().st_size
        if size > max_bytes:
            raise ValueError(
                f"{file} has {size:,} bytes; {what} of {max_bytes:,} at most is read, so that no file fills "
                "the memory; name another file"
            )
        return file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read: {error.strerror or error}; {what} is needed; correct the path, or write it again"
        ) from error


def read_text(file: Path, what: str = "a text file in UTF-8", max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The content of a file in UTF-8, with or without a byte order mark. Raises ValueError."""
    content = read_bytes(file, max_bytes, what)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not in UTF-8: byte {error.start} is 0x{content[error.start]:02x}; {what} is needed; save it "
            "again in UTF-8"
        ) from error


def read_json(file: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds, in UTF-8, -16 or -32, with or without a byte order mark.

    NaN and infinity are read as such, for files of others hold them. Raises ValueError for what is no JSON, and for a
    key that an object has twice, of which a reader would take either.
    """
    return parse_json(read_bytes(file, max_bytes, "a JSON file"), file)


def parse_json(content: bytes, file: Path | str) -> Any:
    """As `read_json`, of bytes that are there already. file: names them, for messages."""
    try:
        return json.loads(content, object_pairs_hook=_each_once)
    except _TwiceError as error:
        raise ValueError(
            f"{file}: an object has the key {printable(repr(error.key))} twice; each key has one value; remove one"
        ) from None
    # ValueError: no UTF-8, no JSON, or a number of thousands of digits; RecursionError: brackets in brackets
    except (ValueError, RecursionError) as error:
        suffix = Path(file).suffix
        start, other = content[:200].lstrip(b"\xef\xbb\xbf \r\n\t"), ""
        if start.startswith(b"<"):
            other = "XML, such as Pascal VOC's"
        elif suffix.lower() in (".csv", ".tsv", ".txt", ".xml", ".yaml", ".yml"):
            other = f"a {suffix} file that begins with {start[:40].decode(errors='replace')!r}"
        if other:
            raise ValueError(f"{file} is {other}; JSON is needed; convert it, or name another file") from error
        reason = "too deeply nested" if isinstance(error, RecursionError) else printable(str(error))
        raise ValueError(
            f"{file} is no complete JSON: {reason}; it may have been cut short; download or write it again"
        ) from error


def read_object(
    file: Path, fields: Mapping[str, type | tuple[type, ...]] | None = None, place: str | None = None
) -> dict[str, Any]:
    """A JSON file that visionmtl wrote: one object with these fields of these types.

    No deeper than MAX_DEPTH, and without whole numbers that 64 bits do not hold.
    place: names what it holds, where that is not the file (a URL that it was fetched from)
    Raises ValueError naming file, or place, and field.
    """
    where = place or str(file)
    content = parse_json(read_bytes(file, MAX_TEXT_BYTES, "a JSON file"), where)
    check_object(content, where, fields)
    return dict(content)


def check_object(content: Any, where: str, fields: Mapping[str, type | tuple[type, ...]] | None = None) -> None:
    """Raises ValueError unless a value is as `read_object` says; a field is looked for by its dotted path."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds {_kind(content)}; an object {{...}} is needed; {_REWRITE}")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        level = [inner for each in level if isinstance(each, dict | list) for inner in _values(each)]
        if any(type(each) is int and abs(each) >= 2**63 for each in level):
            raise ValueError(f"{where} holds a number of more than 63 bits; smaller ones are read; {_REWRITE}")
    if level:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels; so many are read; {_REWRITE}")
    for path, kinds in (fields or {}).items():
        value: Any = content
        for key in path.split("."):
            value = value[key] if isinstance(value, dict) and key in value else _Missing
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        wrong_truth = isinstance(value, bool) and bool not in allowed  # True is an int to Python
        if value is _Missing or wrong_truth or not isinstance(value, allowed):
            found = "no field" if value is _Missing else f"{_kind(value)} as"
            needed = " or ".join("null" if kind is type(None) else _NAMES.get(kind, kind.__name__) for kind in allowed)
            raise ValueError(f"{where} has {found} {path!r}; {needed} is needed there; {_REWRITE}")


def parse_line(line: str, where: str) -> dict[str, Any]:
    """An object as JSON that visionmtl wrote, such as a line of a .jsonl file. where: file and line, for messages."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else printable(str(error))
        raise ValueError(
            f"{where} is not JSON ({reason}); one object a line is needed; repair or delete that line"
        ) from error
    check_object(content, where)
    return dict(content)


def read_yaml(file: Path, what: str = "a YAML file") -> tuple[Any, yaml.Node | None]:
    """What a YAML file holds, see `parse_yaml`, and its nodes, which know their lines. Raises ValueError."""
    return parse_yaml(read_text(file, f"{what} in UTF-8", MAX_YAML_BYTES), str(file))


def parse_yaml(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """Plain data and the nodes of a YAML text; None and None for an empty one.

    As YAML 1.1 has it, but: no tags (`!!python/...`, `!!timestamp`), so that a date stays a text; 1e-3 is a number;
    a key is a text or a whole number, and stands once in its mapping; no more than MAX_NODES values, those behind
    aliases counted each time they are named, and MAX_DEPTH levels. Raises ValueError naming file and line.
    """
    try:
        loader = _Loader(text, where)
        node = loader.get_single_node()
        return (None, None) if node is None else (loader.construct_document(node), node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(
            f"{where}{line} is not YAML: {printable(problem)}; plain YAML is read; correct it there"
        ) from error
    except yaml.YAMLError as error:  # a character that no YAML holds
        raise ValueError(
            f"{where} is not YAML: {printable(_one_line(error))}; plain YAML is read; correct it"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{where} is not YAML: too deeply nested; {MAX_DEPTH} levels are read; flatten it") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules of `parse_yaml`."""

    def __init__(self, text: str, where: str) -> None:
        self._where, self._depth, self._num_nodes = where, 0, 0
        self._sizes: dict[int, int] = {}  # by id of a node: the values in it; absent while it is being read
        super().__init__(text)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        before = self._num_nodes
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            target = self.anchors.get(event.anchor)
            if target is not None:
                if id(target) not in self._sizes:
                    raise self._refusal(line, f"the alias *{event.anchor} stands inside what it names", "remove it")
                self._count(self._sizes[id(target)], line)
            return super().compose_node(parent, index)
        if getattr(event, "tag", None) is not None:
            raise self._refusal(
                line, f"the tag {event.tag!r} asks for another kind of value; plain values are read",
                "remove it; put a text into quotes",
            )  # fmt: skip
        if self._depth >= MAX_DEPTH:
            raise self._refusal(line, f"nested deeper than {MAX_DEPTH} levels", "flatten it")
        self._count(1, line)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        self._sizes[id(node)] = self._num_nodes - before
        return node

    def _count(self, num: int, line: int) -> None:
        self._num_nodes += num
        if self._num_nodes > MAX_NODES:
            raise self._refusal(line, f"more than {MAX_NODES:,} values, aliases written out", "make it shorter")

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            kind = key.tag.rpartition(":")[2]
            if kind == "merge":
                mappings = value.value if isinstance(value, yaml.SequenceNode) else [value]
                if not all(isinstance(mapping, yaml.MappingNode) for mapping in mappings):
                    raise self._refusal(line, "<< takes a mapping, or a list of mappings", "name one by its alias")
                continue
            if kind not in ("str", "int"):
                shown = key.value if isinstance(key.value, str) else f"a {key.id}"
                raise self._refusal(
                    line, f"the key {shown!r} is no text and no whole number (on, off, yes and no are truths to YAML)",
                    "put it into quotes",
                )  # fmt: skip
            if (kind, key.value) in seen:
                raise self._refusal(line, f"the key {key.value!r} stands twice in one mapping", "remove one")
            seen.add((kind, key.value))

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what `<<` names in its place: what is written wins, then what is named first.

        PyYAML lets the last of several mappings win, against YAML's own rule.
        """
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        own = [pair for pair in node.value if not pair[0].tag.endswith(":merge")]
        named = [value for key, value in node.value if key.tag.endswith(":merge")]
        for value in named:
            for mapping in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                self.flatten_mapping(mapping)
                for pair in mapping.value:
                    merged.setdefault(pair[0].value, pair)
        names = {key.value for key, _ in own}
        node.value = [pair for name, pair in merged.items() if name not in names] + own

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")):
            line = node.start_mark.line + 1
            if len(node.value) > _MAX_NUMBER:
                raise self._refusal(line, f"a number of {len(node.value):,} characters", "put it into quotes")
            if node.tag.endswith(":int") and re.fullmatch(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_]+)+)", node.value):
                problem = f"{node.value!r} is {super().construct_object(node)} to some readers and not to others"
                raise self._refusal(line, problem, "leave out leading zeros and colons, or put it into quotes")
            try:
                return super().construct_object(node, deep)
            except ValueError as error:
                raise self._refusal(
                    line, f"{node.value!r} looks like a number and is none", "put it into quotes"
                ) from error
        return super().construct_object(node, deep)

    def _refusal(self, line: int, problem: str, advice: str) -> ValueError:
        return ValueError(f"{self._where}:{line}: {printable(problem)}; plain YAML is read; {advice}")


def _without_dates() -> None:
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        _Loader.yaml_implicit_resolvers[first] = [
            (tag, expression) for tag, expression in resolvers if not tag.endswith((":timestamp", ":float"))
        ]
    number = r"[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)"
    number += r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    _Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{number})$"), list("-+0123456789."))


_Loader.yaml_implicit_resolvers = {}
_without_dates()


def check_plain(value: Any, where: str) -> None:
    """Raises ValueError for what no settings are: other things than plain data, too many or too deep, odd keys."""
    level, num_values = [value], 0
    for _ in range(MAX_DEPTH + 1):
        for each in level:
            if not isinstance(each, dict | list | tuple | str | int | float | bool | None):
                raise ValueError(f"{where} holds {_kind(each)} among its settings; plain data is allowed; {_REWRITE}")
            if isinstance(each, dict) and (strange := [key for key in each if not isinstance(key, str | int)]):
                raise ValueError(f"{where} has the key {strange[0]!r:.80}; keys are texts or whole numbers; {_REWRITE}")
        num_values += len(level)
        if num_values > MAX_NODES:
            raise ValueError(f"{where} has more than {MAX_NODES:,} settings; no run has so many; {_REWRITE}")
        level = [inner for each in level if isinstance(each, dict | list | tuple) for inner in _values(each)]
        if not level:
            return
    raise ValueError(f"{where} nests settings deeper than {MAX_DEPTH} levels; so many are read; {_REWRITE}")


def texts_in(value: Any) -> Iterable[str]:
    """Every text in plain data, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in _values(value):
            yield from texts_in(inner)


def shown(value: Any, length: int = 200) -> str:
    """A value as JSON on one line, in ASCII, cut to `length`; for messages about values from files."""
    try:
        text = json.dumps(value, default=str)
    except (RecursionError, ValueError):  # a number of thousands of digits cannot be written either
        text = f"{_kind(value)}, too large to show"
    return text if len(text) <= length else f"{text[:length]} ..."


def printable(text: str) -> str:
    r"""The text with control characters written out (\x1b), which a terminal would obey; line ends and tabs stay."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# C0, DEL, C1, and what turns the direction of writing around (CVE-2021-42574)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object {...}",
          list: "a list [...]"}  # fmt: skip


class _Missing:
    """Stands for a field that is not there."""


class _TwiceError(ValueError):
    """An object has a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        raise _TwiceError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return content


def _values(holder: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterable[Any]:
    return holder.values() if isinstance(holder, dict) else holder


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), f"a {type(value).__name__}")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
