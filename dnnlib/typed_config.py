"""Base class of the configuration dataclasses: typed fields that are checked, written as JSON and read back.

A configuration is a frozen, keyword-only dataclass whose fields are numbers, strings, booleans, tuples of strings,
`FrozenMapping`s of numbers, other configurations, or None.
"""

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache, wraps
from operator import attrgetter
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from dnnlib.cli import UserError


class ConfigError(UserError):
    """An invalid setting; the message is one line that names it and what was expected."""


class FrozenMapping(Mapping[str, float]):
    """Immutable, hashable and picklable mapping from names to numbers, in order."""

    def __init__(self, items: Mapping[str, float]):
        self._items = dict(items)

    def __getitem__(self, key: str) -> float:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of configurations: types checked at construction, `to_dict`, `from_dict`.

    Subclasses check values in `check`.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {}  # earlier name of a field -> its current name; see `with_old_names`

    def __post_init__(self) -> None:
        """Raise ConfigError when a field does not have its declared type, then run `check`."""
        for name, hint in _field_types(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                raise ConfigError(f"{self.label(name)} is {value!r}; expected {_describe_type(hint)}")
        self.check()

    def label(self, name: str) -> str:
        """Return the name of field `name` in messages."""
        return f"{type(self).__name__}.{name}"

    def check(self) -> None:
        """Raise ConfigError when a value is out of range; types are already checked."""

    def require(self, holds: bool, name: str, expected: str) -> None:
        """Raise ConfigError about field `name` unless `holds`."""
        if not holds:
            raise ConfigError(f"{self.label(name)} is {getattr(self, name)!r}; expected {expected}")

    def require_at_least(self, minimum: float, *names: str) -> None:
        """Raise ConfigError about the first field in `names` whose value is below `minimum`."""
        for name in names:
            self.require(getattr(self, name) >= minimum, name, f"a number >= {minimum}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, in declaration order; `from_dict` is the inverse."""
        return {field.name: _to_json(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "") -> Self:
        """Build a configuration from the output of `to_dict`.

        data:  as read from JSON
        where: dotted path of `data` in its file, a prefix of names in messages

        Raises ConfigError on an unknown key, a missing field without default, a wrong type or a value out of range.
        """
        if not isinstance(data, Mapping):
            name = cls.__name__
            raise ConfigError(f"{where or name} is {data!r}; expected an object with the fields of {name}")
        hints = _field_types(cls)
        prefix = f"{where}." if where else ""
        data = _renamed(data, cls.OLD_NAMES, where or cls.__name__)
        for key in data:
            if key not in hints:
                known = ", ".join(hints)
                raise ConfigError(f"{prefix}{key} is not a setting of {cls.__name__}; expected one of {known}")
        for field in fields(cls):
            if field.name not in data and field.default is MISSING:
                raise ConfigError(f"{prefix}{field.name} is missing; expected {_describe_type(hints[field.name])}")
        return cls(**{key: _from_json(value, hints[key], prefix + key) for key, value in data.items()})


def with_old_names(**names: str) -> Callable[[type[Config]], type[Config]]:
    """Decorate a configuration so that fields can also be used by their names in earlier versions.

    names: old name = current name. The constructor and `from_dict` accept either, attributes can be read by either,
    and `to_dict` and messages use the current one.
    """
    def decorate(cls: type[Config]) -> type[Config]:
        construct = cls.__init__

        @wraps(construct)
        def __init__(self: Config, **values: Any) -> None:
            construct(self, **_renamed(values, names, cls.__name__))

        cls.__init__, cls.OLD_NAMES = __init__, names
        for old, new in names.items():
            setattr(cls, old, property(attrgetter(new)))
        return cls

    return decorate


def _renamed(values: Mapping[str, Any], old_names: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return values by the current names of their fields. Raises ConfigError when both names of a field are given."""
    for old, new in old_names.items():
        if old in values and new in values:
            raise ConfigError(f"{where} has both {old} and {new}; expected only {new}, its current name")
    return {old_names.get(name, name): value for name, value in values.items()}


@cache
def _field_types(cls: type) -> dict[str, Any]:
    """Return the declared types of a configuration's fields, in order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of `A | B`, or the type itself."""
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the declared type; whole numbers are valid floats, booleans are not numbers."""
    alternatives = _alternatives(hint)
    if len(alternatives) > 1:
        return any(_fits(value, alternative) for alternative in alternatives)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, get_args(hint)[0]) for item in value)
    if hint is FrozenMapping:
        return isinstance(value, FrozenMapping) and all(
            isinstance(key, str) and _fits(item, float) for key, item in value.items()
        )
    return isinstance(value, hint)


def _describe_type(hint: Any) -> str:
    """Name a declared type for an error message."""
    alternatives = _alternatives(hint)
    if len(alternatives) > 1:
        return " or ".join(_describe_type(alternative) for alternative in alternatives)
    if get_origin(hint) is tuple:
        return "a list of strings"
    names = {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "a string",
        type(None): "null",
        FrozenMapping: "a mapping from names to finite numbers",
    }
    return names.get(hint) or f"the fields of {hint.__name__}"


def _to_json(value: Any) -> Any:
    """Convert a field's value to JSON types."""
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, FrozenMapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _from_json(value: Any, hint: Any, where: str) -> Any:
    """Convert JSON types to the declared type of a field; raise ConfigError when they do not fit."""
    inner = next((kind for kind in _alternatives(hint) if kind is not type(None)), hint)
    if value is None and type(None) in _alternatives(hint):
        return None
    if isinstance(inner, type) and issubclass(inner, Config):
        return inner.from_dict(value, where=where)
    if inner is FrozenMapping and isinstance(value, Mapping):
        value = FrozenMapping(value)
    elif get_origin(inner) is tuple and isinstance(value, list):
        value = tuple(value)
    if not _fits(value, hint):
        raise ConfigError(f"{where} is {value!r}; expected {_describe_type(hint)}")
    return value
