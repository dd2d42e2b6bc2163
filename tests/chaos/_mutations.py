"""Damage to files: bytes of any kind, and values of JSON, YAML, XML and PNG by their structure; all from a seed."""

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import yaml

TOUCH = "@TOUCH@"
"""Stands in payloads for a file; whatever runs one makes it."""

_DEEP = "@DEEP@"  # becomes thousands of brackets, which no encoder of JSON would write
_HUGE = "@HUGE@"  # becomes a number of thousands of digits
_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**63, -(2**63), 10**400,
    "", "a", "0", "1e999", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J\x1b]0;title\x07", "é" * 300,
    "${oc.env:HOME}", "${seed}", "~", f"__import__('os').system('touch {TOUCH}')", "os.system", "../../..", "a.b.C",
    [], {}, [[]], [{}], [None], {"type": "a.b"}, {"type": None}, [0] * 300, _DEEP, _HUGE, [1, 2, 3, 4],
    [[1, 2], [3, 4]],
    {"size": [0, 0], "counts": ""}, {"size": [0, 0], "counts": []}, {"size": [24, 32], "counts": "~~~~~~"},
    {"size": [2**20, 2**20], "counts": [2**40]}, [[1e30] * 8], [[1, 2]],
]  # fmt: skip
_YAML_WORDS = [
    f"!!python/object/apply:os.system ['touch {TOUCH}']", "!!python/name:os.system {}", "!!timestamp 2001-99-99",
    "2001-99-99", "!!int x", "!!binary =", "!!set {a, b}", "! x", "*a", "&a [*a]", "&a {b: *a}", "<<: *a", "<<: x",
    "<<: [1]", "? [a, b]", "? {a: b}", "? ", "0x_", "0b_", "0o9", "._", "1:1:1", "1e5", ".nan", "-.inf", "~", "yes: 1",
    "null: 1", "1.5: x", "\t", "\0", "\ufeff", "\x1b[2J", "{" * 300, "[" * 5000, "- " * 200, "%YAML 9.9\n---",
    "--- a\n--- b",
    "${oc.env:HOME}", "${oc.decode:1}", "${oc.create:{a: b}}", "${", "${}", "${seed}${seed}", "${..seed}", "???",
    "base: fuzz.yaml", "base: [1]", "base: ../../..", "remove: [a..b]", "type: ../../..", "type: os.path",
    "a: &x [1]\nb: *x",
    "0x" + "f" * 9000, "9" * 5000, '"\\ud800"', "'", '"', "|\n", ">\n  a", "@", "`", "a: b: c", "- a\n b: c",
    "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9 if n else ['x'] * 9)}]\n" for n in range(9)),
]  # fmt: skip
_XML_WORDS = [
    '<?xml version="1.0" encoding="shift_jis"?>', '<?xml version="1.0" encoding="none"?>',
    "<!DOCTYPE a [<!ENTITY b 'c'>]>",
    '<!DOCTYPE a SYSTEM "file:///etc/passwd">', "&lol;", "&#0;", "&#x1b;", "<![CDATA[", "]]>", "<a>" * 3000,
    "<object/>",
    "<bndbox/>", "<xmin>nan</xmin>", "<xmin>1e999</xmin>", "<name>\x1b[2J</name>", "<size><width>-1</width></size>",
    "\0",
]  # fmt: skip
_LINE_WORDS = [
    "nan", "inf", "1e999", "-1", "9" * 5000, "0 0.5 0.5", "0 .1 .1 .2 .2 .3", "\0", "\x1b[2J", "../../x", "/etc/passwd",
    "\ufeff", "é", ",", ";", "#", "\u2028", "a b c", "255,255,256,x",
]  # fmt: skip
_INTERESTING = [
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\x80",
    b"\0\1",
    b"\xff\xff",
    b"\0",
    b"\xff",
]


def mutate(content: bytes, name: str, rng: random.Random, other: bytes) -> bytes:
    """One damaged version of a file. name: its ending decides about the structure; other: a file to splice from."""
    ending = name.rpartition(".")[2].lower()
    structured = _STRUCTURED.get(ending)
    if structured is not None and rng.random() < 0.6:
        try:
            return structured(content, rng)
        except (ValueError, RecursionError, yaml.YAMLError, UnicodeError, IndexError):
            pass  # damaged already
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = _damage_bytes(content, rng, other)
    return content


def _damage_bytes(content: bytes, rng: random.Random, other: bytes) -> bytes:
    if not content:
        return rng.randbytes(rng.randrange(64))
    at = rng.randrange(len(content))
    length = rng.choice((1, 2, 4, 16, 100))
    # most of what matters is at the beginning of a file
    if rng.random() < 0.5:
        at = min(at, rng.randrange(min(len(content), 512)))
    kind = rng.randrange(8)
    if kind == 0:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + rng.randbytes(length) + content[at:]
    if kind == 3:
        return content[:at] + content[at + length :]
    if kind == 4:
        start = rng.randrange(len(other) or 1)
        return content[:at] + other[start : start + length * 4] + content[at:]
    if kind == 5:
        return content[:at] + bytes(length) + content[at + length :]
    if kind == 6:
        word = rng.choice(_INTERESTING)
        return content[:at] + word + content[at + len(word) :]
    changed = bytearray(content)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (holder, key) in nested plain data."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        found.append((value, key))
        if isinstance(inner, dict | list):
            _places(inner, found)
    return found


def _damage_value(value: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(value, []) if isinstance(value, dict | list) else []
        if not places or rng.random() < 0.02:
            return _value(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind <= 2:
            holder[key] = _value(rng)
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            from_holder, from_key = rng.choice(places)
            holder[key] = json.loads(json.dumps(from_holder[from_key])) if from_key in _keys(from_holder) else None
        elif isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[rng.choice(["type", "id", "", "\x1b[2J", "0", "name"])] = _value(rng)
    return value


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_VALUES))  # the next damage may be inside it


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def _write_json(value: Any, rng: random.Random) -> str:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7, indent=rng.choice((None, 1)))
    deep = rng.choice((50, 300, 900, 100_000))
    return text.replace(f'"{_DEEP}"', "[" * deep + "]" * deep).replace(f'"{_HUGE}"', "9" * rng.choice((400, 5000)))


def _damage_json(content: bytes, rng: random.Random) -> bytes:
    text = _write_json(_damage_value(json.loads(content), rng), rng)
    if rng.random() < 0.05 and '"' in text:  # a key twice
        key = text.split('"')[1]
        text = text.replace("{", f'{{"{key}": 0, ', 1)
    encoding = rng.choice(("utf-8",) * 8 + ("utf-16", "latin-1", "utf-8-sig"))
    return text.encode(encoding, errors="surrogatepass" if "utf" in encoding else "replace")


def _damage_lines(words: list[str]) -> Callable[[bytes, random.Random], bytes]:
    def damage(content: bytes, rng: random.Random) -> bytes:
        text = content.decode()
        for _ in range(rng.choice((1, 1, 2))):
            lines = text.split("\n")
            at = rng.randrange(len(lines))
            word, line = rng.choice(words), lines[at]
            column = rng.randrange(len(line) + 1)
            kind = rng.randrange(4)
            if kind == 0:
                lines[at] = line[:column] + word + line[column:]
            elif kind == 1:
                lines.insert(at, word)
            elif kind == 2 and ":" in line:
                lines[at] = f"{line.partition(':')[0]}: {word}"
            else:
                lines[at] = " ".join(word if rng.random() < 0.3 else part for part in line.split(" "))
            text = "\n".join(lines)
        return text.encode(errors="surrogatepass")

    return damage


def _damage_yaml(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return _damage_lines(_YAML_WORDS)(content, rng)
    text = _write_json(_damage_value(yaml.safe_load(content), rng), rng)  # JSON is YAML
    return text.encode(errors="surrogatepass")


def _damage_jsonl(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = _damage_json(lines[at], rng).replace(b"\n", b" ")
    return b"\n".join(lines) + b"\n"


def _damage_png(content: bytes, rng: random.Random) -> bytes:
    """A chunk changed, left out or twice, with its checksum made anew: past the first check of any decoder."""
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    which = rng.randrange(len(chunks))
    kind, data = chunks[which]
    action = rng.randrange(5)
    if action == 0:
        del chunks[which]
    elif action == 1:
        chunks.insert(which, chunks[which])
    elif action == 2 and kind == b"IHDR":
        sides = [rng.choice((0, 1, 23, 2**16, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
        chunks[which] = kind, struct.pack(">II", *sides) + data[8:]
    else:
        chunks[which] = kind, _damage_bytes(data, rng, content)
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return content[:8] + b"".join(parts)


_STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _damage_json, "jsonl": _damage_jsonl, "yaml": _damage_yaml, "xml": _damage_lines(_XML_WORDS),
    "txt": _damage_lines(_LINE_WORDS), "csv": _damage_lines(_LINE_WORDS), "png": _damage_png,
}  # fmt: skip
