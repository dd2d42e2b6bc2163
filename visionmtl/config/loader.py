"""YAML files merged onto their bases, then overrides from the command line: one tree that knows every origin."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from visionmtl.config.paths import shipped_folder
from visionmtl.config.suggest import did_you_mean
from visionmtl.config.text_files import MAX_NODES, parse_yaml, printable, read_yaml

SHIPPED = shipped_folder("configs")

Key = str | int
KeyPath = tuple[Key, ...]
"""The way to a value: field names, and positions in lists."""


class ConfigError(ValueError):
    """Something in a config, or in an override, is not as it must be; the text lists every problem."""


def dotted(keys: KeyPath) -> str:
    """("data", "train", 0, "root") -> "data.train.0.root"."""
    return ".".join(str(key) for key in keys)


@dataclass
class Tree:
    """Nested plain data, and for each value in it the file and line, or the override, that it came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, keys: KeyPath) -> str:
        """Where the value was written; for what was never written, where the nearest mapping around it was."""
        around = (keys[:length] for length in range(len(keys), -1, -1))
        return next(self.origins[at] for at in around if at in self.origins)

    def written(self, keys: KeyPath) -> str | None:
        """Where exactly this value was written; None for a default."""
        if keys in self.origins:
            return self.origins[keys]
        for length in range(len(keys) - 1, 0, -1):
            outer = _descend(self.values, keys[:length])
            word = isinstance(outer, str) and keys[length:] == ("type",)  # `pyramid: fpn`
            if word or (isinstance(outer, str) and "${" in outer):
                return self.origins[keys[:length]]
        return None

    def merge(self, values: Mapping[str, Any], origins: Mapping[KeyPath, str]) -> None:
        """Lay a mapping over this tree.

        Mappings merge key by key, anything else replaces. A mapping with another `type` than the one below replaces
        it whole, since fields of one type mean nothing to another; so does a mapping laid over a list. A mapping
        without `type` laid over a word takes the word as its type (`pyramid: fpn` is `pyramid: {type: fpn}`).
        """
        self.values = self._merged(self.values, values, (), origins)

    def _merged(self, below: Any, above: Any, keys: KeyPath, origins: Mapping[KeyPath, str]) -> Any:
        if isinstance(above, Mapping):
            if isinstance(below, str) and "type" not in above:
                below = {"type": below}
                self.origins[(*keys, "type")] = self.origin(keys)
            if isinstance(below, Mapping) and below.get("type") in (None, above.get("type", below.get("type"))):
                self.origins[keys] = origins.get(keys, origins[()])
                merged = dict(below)
                for key, value in above.items():
                    merged[key] = self._merged(below.get(key), value, (*keys, key), origins)
                return merged
        self.forget(keys)
        self.origins.update({at: origin for at, origin in origins.items() if at[: len(keys)] == keys})
        return above

    def forget(self, keys: KeyPath) -> None:
        """Drop the origins of a value and of everything in it."""
        self.origins = {at: origin for at, origin in self.origins.items() if at[: len(keys)] != keys}

    def remove(self, path: str, by: str) -> None:
        """Take out the value at a dotted path, e.g. `tasks.depth`."""
        *outer, last = keys = self.locate(path, by)
        holder = _descend(self.values, outer)
        if not isinstance(holder, dict) or last not in holder:
            known = holder if isinstance(holder, dict) else []
            raise ConfigError(
                f"nothing to remove at {path!r}{did_you_mean(str(last), map(str, known))}; "
                f"{dotted(tuple(outer)) or 'the config'} holds {', '.join(map(str, known)) or 'no fields'}; "
                f"correct {by}"
            )
        del holder[last]
        self.forget(tuple(keys))

    def locate(self, path: str, by: str) -> KeyPath:
        """A dotted path as a `KeyPath`: positions become numbers where this tree has a list."""
        keys: list[Key] = []
        here: Any = self.values
        for part in path.split("."):
            if not part:
                raise ConfigError(
                    f"{path!r} is no path to a setting; write names joined by dots, as in optim.lr; correct {by}"
                )
            key: Key = part
            if isinstance(here, list):
                if not part.isdecimal() or int(part) >= len(here):
                    raise ConfigError(
                        f"{dotted((*keys, part))} does not exist: {dotted(tuple(keys))} is a list of {len(here)}; "
                        f"its entries are 0 to {len(here) - 1}; correct {by}"
                    )
                key = int(part)
            keys.append(key)
            here = _descend(here, [key])
        return tuple(keys)

    def override(self, text: str) -> None:
        """Apply `a.b=value` (value in YAML), or `~a.b`, which removes."""
        by = f"override {text}"
        if not isinstance(text, str):
            raise ConfigError(
                f"{text!r} is no override; a text path=value is needed, such as optim.lr=1e-3; correct it"
            )
        if text.startswith("~"):
            self.remove(text[1:], by)
            return
        path, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(
                f"{text!r} is no override; write path=value, or ~path to remove; for instance optim.lr=1e-3"
            )
        keys = self.locate(path, by)
        try:
            parsed, _ = parse_yaml(value, by)
        except ValueError as error:
            raise ConfigError(f"{error}, or put the value into quotes: {path}='\"...\"'") from error
        positions = [at for at, key in enumerate(keys) if isinstance(key, int)]
        split = positions[-1] + 1 if positions else 0
        above: Any = parsed
        for key in reversed(keys[split:]):
            above = {key: above}
        origins = {(): by} | {keys[:length]: by for length in range(split, len(keys) + 1)}
        origins |= {(*keys, *inner): by for inner in _everything(parsed)}
        if not split:
            self.merge(above, {**origins, (): self.origins[()]})
            return
        holder = _descend(self.values, keys[: split - 1])
        holder[keys[split - 1]] = self._merged(holder[keys[split - 1]], above, keys[:split], origins)

    def resolved(self, part: str | None = None) -> dict[str, Any]:
        """The values with `${...}` filled in; part: only those below one top-level name."""
        if part is not None and part not in self.values:
            raise ConfigError(f"{part}: missing; it must be given; add {part}: ... (from {self.origins[()]})")
        keys: KeyPath = () if part is None else (part,)
        plain = _Interpolation(self).fill_in(_descend(self.values, keys), keys)
        if not isinstance(plain, dict):
            raise ConfigError(
                f"{part}: found {printable(repr(plain))[:100]}; a mapping of settings is needed; correct the value "
                f"(from {self.origin(keys)})"
            )
        return {str(key): value for key, value in plain.items()}


_REFERENCE = re.compile(r"\\\$\{|\$\{(?P<inside>[^${}]*)\}|\$\{")
_HINT = "${...} must name a setting, or a set variable as ${oc.env:NAME}; "
_MAX_CHAIN = 32
"""References that lead from one to the next."""


class _Interpolation:
    """Fills in `${path.of.a.setting}` and `${oc.env:VARIABLE}`, with limits on what comes out of it."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._filled: dict[KeyPath, tuple[Any, int]] = {}  # what was referred to, with the number of values in it
        self._chain: list[KeyPath] = []  # of references that are being followed
        self._num_values = 0

    def fill_in(self, value: Any, keys: KeyPath) -> Any:
        """The value with every reference in it followed. keys: where it stands, for messages."""
        self._count(1, keys)
        if isinstance(value, dict):
            return {key: self.fill_in(inner, (*keys, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.fill_in(inner, (*keys, at)) for at, inner in enumerate(value)]
        if value == "???" and isinstance(value, str):
            raise self._problem(keys, "left open (???); it must be given", hint="")
        if not isinstance(value, str) or "${" not in value:
            return value
        alone = _REFERENCE.fullmatch(value)
        if alone and alone["inside"] is not None:
            return self._follow(alone["inside"], keys)
        text = _REFERENCE.sub(lambda match: self._text(match, keys), value)
        self._count(len(text) // 100, keys)
        return text

    def _text(self, match: re.Match[str], keys: KeyPath) -> str:
        if match[0].startswith("\\"):
            return "${"
        if match["inside"] is None:
            raise self._problem(keys, "'${' without a path and '}' behind it; \\${ stands for the signs themselves")
        value = self._follow(match["inside"], keys)
        if isinstance(value, dict | list):
            raise self._problem(keys, f"{match[0]} is no single value, and stands inside a text; name a single one")
        return str(value)

    def _follow(self, inside: str, keys: KeyPath) -> Any:
        kind, colon, argument = inside.partition(":")
        if colon:
            variable, comma, default = (part.strip() for part in argument.partition(","))
            if kind.strip() != "oc.env":
                raise self._problem(keys, f"${{{inside}}} names no setting and no variable")
            if variable in os.environ:
                return os.environ[variable]
            if not comma:
                raise self._problem(keys, f"the environment has no variable {variable!r}; set it")
            return None if default == "null" else default.strip("'\"")

        target: KeyPath = ()
        here: Any = self.tree.values
        for part in inside.strip().replace("[", ".").replace("]", "").split("."):
            if isinstance(here, str) and "${" in here:
                here = self._at(target, here, keys)
            key: Key = int(part) if isinstance(here, list) and re.fullmatch("[0-9]{1,9}", part) else part
            if isinstance(here, dict) and key not in here and re.fullmatch("-?[0-9]{1,9}", part):
                key = int(part)
            if not (key in here if isinstance(here, dict) else isinstance(here, list) and key in range(len(here))):
                raise self._problem(keys, f"${{{inside}}} names no setting")
            target, here = (*target, key), here[key]
        return self._at(target, here, keys)

    def _at(self, target: KeyPath, value: Any, keys: KeyPath) -> Any:
        """What stands at `target`, filled in; once, however often it is referred to."""
        if target in self._chain or len(self._chain) == _MAX_CHAIN:
            raise self._problem(
                keys, f"its reference leads in a circle, or over {_MAX_CHAIN} others, at {dotted(target)}"
            )
        if target in self._filled:
            filled, size = self._filled[target]
            self._count(size, keys)
            return filled
        self._chain.append(target)
        before = self._num_values
        filled = self.fill_in(value, target)
        self._chain.pop()
        self._filled[target] = filled, self._num_values - before
        return filled

    def _count(self, num: int, keys: KeyPath) -> None:
        self._num_values += num
        if self._num_values > MAX_NODES:
            raise self._problem(keys, f"the config has more than {MAX_NODES:,} values, references written out")

    def _problem(self, keys: KeyPath, problem: str, hint: str = _HINT) -> ConfigError:
        return ConfigError(
            f"{dotted(keys)}: {printable(problem)}; {hint}add {dotted(keys)}=VALUE (from {self.tree.origin(keys)})"
        )


def read(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """The tree of a config file over its bases, with overrides on top.

    A file names what it builds on by `base:` (a file, or a list whose later entries win; relative to itself) and what
    it does not want of it by `remove:` (a list of dotted paths).
    """
    tree = _file(find(path), ())
    for override in overrides:
        tree.override(override)
    return tree


def find(path: str | Path) -> Path:
    """The config file at `path`, or of that name among the shipped ones; the ending .yaml may be left out."""
    path = Path(path)
    inside = _below_configs(path)
    for candidate in (path, path.with_name(path.name + ".yaml"), SHIPPED / inside, SHIPPED / f"{inside}.yaml"):
        if os.path.isfile(candidate):
            return candidate
    known = sorted(str(file.relative_to(SHIPPED)) for file in SHIPPED.rglob("*.yaml"))
    near = difflib.get_close_matches(inside.name, known, n=3, cutoff=0.5) or known
    raise ConfigError(
        f"no config file {str(path)!r}, neither from here nor among the shipped ones in {SHIPPED.name}/; "
        f"nearest: {', '.join(near) or 'none'}; correct the name"
    )


def _file(path: Path, below: tuple[Path, ...]) -> Tree:
    if path.resolve() in below:
        chain = " -> ".join(file.name for file in (*below, path))
        raise ConfigError(
            f"configs build on each other in a circle: {chain}; a base must not lead back; remove one `base:`"
        )
    try:
        values, node = read_yaml(path, "a config (YAML)")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {type(values).__name__}; a config is a mapping of settings; write `seed: 0` or the like"
        )
    origins: dict[KeyPath, str] = {keys: f"{path}:{line}" for keys, line in _lines(node, ()).items()}

    bases, removed = _names(values, "base", path), _names(values, "remove", path)
    tree = Tree()
    for base in bases:
        under = _file(find_base(path, base), (*below, path.resolve()))
        tree.merge(under.values, {(): str(path), **under.origins})
    for gone in removed:
        tree.remove(gone, f"`remove:` in {path}")
    tree.merge(values, {(): str(path), **origins})
    return tree


def find_base(path: Path, base: str) -> Path:
    """The base file named in `path`: relative to it, else a shipped config."""
    for file in (path.parent / os.path.expanduser(base), SHIPPED / _below_configs(Path(base))):
        if os.path.isfile(file):  # for a name that is too long for any disk, pathlib raises
            return file
    places = [place for place in ((path.parent / base).parent, SHIPPED) if os.path.isdir(place)]
    near = did_you_mean(Path(base).name, (other.name for place in places for other in place.glob("*.yaml")))
    raise ConfigError(
        f"{path} builds on {base[:200]!r}, which does not exist{near}; a base is a file relative to this one, or a "
        "shipped config; correct `base:`"
    )


def _below_configs(path: Path) -> Path:
    return path.relative_to("configs") if path.parts[:1] == ("configs",) else path


def _names(values: dict[Any, Any], key: str, path: Path) -> list[str]:
    names = values.pop(key, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"`{key}:` in {path} is {names!r}; it takes a name or a list of names; correct it")
    return names


def _lines(node: yaml.Node | None, keys: KeyPath) -> dict[KeyPath, int]:
    """The line on which each value below `keys` is written; of a merged mapping (<<), its lines at the anchor."""
    lines: dict[KeyPath, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*keys, key.value)] = key.start_mark.line + 1
            lines |= _lines(value, (*keys, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            lines[(*keys, position)] = value.start_mark.line + 1
            lines |= _lines(value, (*keys, position))
    return lines


def _everything(value: Any) -> list[KeyPath]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, inner in entries for way in ((key,), *((key, *rest) for rest in _everything(inner)))]


def _descend(value: Any, keys: Sequence[Key]) -> Any:
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int):
            value = value[key]
        else:
            return None
    return value
