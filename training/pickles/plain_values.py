"""Copy untrusted values into plain ones that JSON can hold."""
import math

from training.pickles.machine import PickleRefused, quote

_MAX_DEPTH, _MAX_VALUES = 16, 10_000  # shared references could otherwise unfold without end


def to_plain(value: object, where: str) -> object:
    """Return a copy of None, bool, int, finite float, str, and lists and str-keyed dicts of them; tuples become lists.

    where: name for messages.
    Raises ValueError for anything else, and when the value is nested too deep or holds too much.
    """
    return _Copier(where).copy(value, 0)


class _Copier:
    def __init__(self, where: str) -> None:
        self.where = where
        self.num_values = 0

    def copy(self, value: object, depth: int) -> object:
        self.num_values += 1
        if depth > _MAX_DEPTH:
            raise PickleRefused(f"{self.where} is nested more than {_MAX_DEPTH} levels deep; no network's file is")
        if self.num_values > _MAX_VALUES:
            raise PickleRefused(f"{self.where} holds more than {_MAX_VALUES:,} values; no network's file does")
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float and math.isfinite(value):
            return value
        if type(value) in (list, tuple):
            return [self.copy(item, depth + 1) for item in value]
        if type(value) is dict and all(type(key) is str for key in value):
            return {key: self.copy(item, depth + 1) for key, item in value.items()}
        raise PickleRefused(f"{self.where} holds {quote(value)}; expected plain values")
