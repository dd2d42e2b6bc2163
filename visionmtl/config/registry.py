"""Settings as frozen values: `Spec`, and `Configurable` for settings that choose an implementation by `type:`."""

import builtins
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema
from typing_extensions import Self

from visionmtl.config import imports
from visionmtl.config.suggest import did_you_mean
from visionmtl.config.text_files import shown


class Spec(BaseModel):
    """Frozen settings. Unknown fields are errors; `build` of the subclass makes the thing they describe.

    A text that begins with ~ is a path in the home folder.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    former: ClassVar[Mapping[str, Any]] = {}
    """Settings of earlier versions and their default, with which saved configs still hold them; it is passed over."""

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Fill in the home folder where a setting begins with ~; name the nearest field to an unknown one."""
        if isinstance(value, dict):
            value = {name: v for name, v in value.items() if name not in cls.former or v != cls.former[name]}
            paths = {name: path for name, path in value.items() if isinstance(path, str | Path)}
            value = value | {name: expanduser(path) for name, path in paths.items() if str(path).startswith("~")}
        try:
            return handler(value)
        except ValidationError as error:
            details = [_detail(detail, list(cls.model_fields)) for detail in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, details) from None

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take true for 1 and false for 0."""
        if _holds_bool(value) and _is_number(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError(f"found {shown(value)} (in YAML also yes, no, on, off); allowed is a number; write one")
        return value


def _holds_bool(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(_holds_bool(each) for each in value))


def _is_number(annotation: Any) -> bool:
    """Whether a field takes numbers, or lists of them, and neither true nor false."""
    kinds = _kinds(annotation)
    return bool(kinds & {int, float}) and not kinds & {bool, Any}


def _kinds(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return set().union(*map(_kinds, inner)) if inner else {annotation}


Size = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
"""(H, W) in pixels."""


def _each_once(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if values is not None and any(value in values[:i] for i, value in enumerate(values)):
        raise ValueError(f"{list(values)} names one of its values twice; each counts once; remove the repeated one")
    return values


EachOnce = AfterValidator(_each_once)
"""Beside the type of a list: no value stands in it twice."""

PYDANTIC_ERRORS = frozenset(get_args(core_schema.ErrorType))
"""The types of errors whose text is pydantic's own."""


def _detail(detail: Any, known: list[str]) -> InitErrorDetails:
    """The same error to raise again; an unknown field of this spec gets a text that names the nearest one."""
    kind: Any = detail["type"]
    if kind == "extra_forbidden" and len(detail["loc"]) == 1:
        name = str(detail["loc"][0])
        text = f"unknown field {name!r}{did_you_mean(name, known)}; allowed are {', '.join(known)}; correct it"
        kind = PydanticCustomError("unknown_field", "{text}", {"text": text})
    elif kind not in PYDANTIC_ERRORS:
        kind = PydanticCustomError(kind, "{text}", {"text": detail["msg"]})
    return InitErrorDetails(type=kind, loc=detail["loc"], input=detail["input"], ctx=detail.get("ctx", {}))


class Configurable(Spec):
    """A family of specs told apart by `type:`, e.g. every task or every pyramid.

    The base of a family names its package, the module or package where members are found:
    `class Task(Configurable, package="visionmtl.tasks")`. A member declares `type: Literal["depth"] = "depth"`.
    A field annotated with the base then accepts any member, given as an instance or as a mapping with `type`.
    Code outside the package joins by its import path: `type: my_module.MyTask`, declared
    `type: Literal["my_module.MyTask"]`, so that a saved config finds it again. From a checkpoint such a path is
    imported only where the user allows the module by name, see `config.imports`.
    """

    package: ClassVar[str] = ""
    type: str = ""

    def __init_subclass__(cls, package: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if package:
            cls.package = package

    @classmethod
    def _is_base(cls) -> bool:
        return "package" in cls.__dict__ and bool(cls.package)

    @classmethod
    def members(cls) -> dict[str, builtins.type[Self]]:  # `type` is a field here
        """Every member found on disk in the family's package, by its `type`."""
        module = importlib.import_module(cls.package)
        for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
            importlib.import_module(f"{cls.package}.{found.name}")
        return {name: kind for kind in _descendants(cls) if (name := kind.model_fields["type"].default)}

    @classmethod
    def find(cls, name: str) -> builtins.type[Self]:
        """The member called `name`; a name with a dot is imported. Raises PydanticCustomError with the choices."""
        if "." in name:
            module, _, attribute = name.rpartition(".")
            if not all(part.isidentifier() for part in name.split(".")):
                text = (
                    f"type {name!r} is no import path; one is module.Class, names joined by dots; correct it, or "
                    f"choose one of: {', '.join(sorted(cls.members()))}"
                )
                raise PydanticCustomError("type_import", "{text}", {"text": text})
            if refused := imports.refusal(module):
                raise PydanticCustomError("type_import", "{text}", {"text": f"type {name!r}: {refused}"})
            try:
                found = getattr(importlib.import_module(module), attribute, None)
                problem = f"{module} has no {attribute}; correct the name" if found is None else ""
            except SyntaxError as error:
                problem = f"{error}; correct that file"
            except ImportError as error:
                problem = f"{error}; put its folder on PYTHONPATH or correct the name"
            if problem:
                text = f"type {name!r} cannot be imported: {problem}"
                raise PydanticCustomError("type_import", "{text}", {"text": text})
            if not (isinstance(found, type) and issubclass(found, cls)):
                text = f"{name} is not a {cls.__name__}; let it inherit from {cls.__module__}.{cls.__name__}"
                raise PydanticCustomError("type_kind", "{text}", {"text": text})
            return found

        module_name = f"{cls.package}.{name}"
        if name.isidentifier() and find_spec(module_name):  # nearly always the file is called as the type
            importlib.import_module(module_name)
            for member in _descendants(cls):
                if member.__module__ == module_name and member.model_fields["type"].default == name:
                    return member
        members = cls.members()  # imports every file of the package
        if name not in members:
            text = (
                f"unknown {cls.__name__} type {name[:80]!r}{did_you_mean(name, members)}; known are "
                f"{', '.join(sorted(members))}, and the import path of your own class; correct it"
            )
            raise PydanticCustomError("type_unknown", "{text}", {"text": text})
        return members[name]

    @classmethod
    def _choose(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):  # `pyramid: fpn` is short for `pyramid: {type: fpn}`
            value = {"type": value}
        if not isinstance(value, dict) or not isinstance(value.get("type"), str):
            is_single = isinstance(value, int | float | bool | None)
            found = shown(value, 50) if is_single else f"a {type(value).__name__}"
            if isinstance(value, dict):
                found = f"type {shown(value['type'], 50)}" if "type" in value else "no type"
            text = f"found {found}; a {cls.__name__} needs 'type'; choose one of: {', '.join(sorted(cls.members()))}"
            raise PydanticCustomError("type_missing", "{text}", {"text": text})
        return cls.find(value["type"]).model_validate(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not cls._is_base():
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls._choose,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda member: member.model_dump()),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if not cls._is_base():
            return handler(schema)
        own = {"type": "object", "required": ["type"], "properties": {"type": {"type": "string", "pattern": r"\."}}}
        if cls in _described:  # a member that holds another one of its family: not spelt out again
            return {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}}
        members = sorted(cls.members().items())
        _described.add(cls)
        try:
            specs = [handler(member.__pydantic_core_schema__) for _, member in members]
        finally:
            _described.remove(cls)
        return {"anyOf": [*specs, {"enum": [name for name, _ in members]}, own]}


_Family = TypeVar("_Family", bound=Configurable)
_described: set[type[Configurable]] = set()
"""Families whose JSON schema is being written."""


def _descendants(cls: type[_Family]) -> Iterable[type[_Family]]:
    for child in cls.__subclasses__():
        yield child
        yield from _descendants(child)
