"""Interpret a pickle stream without importing or calling anything that it names.

This is an interpreter of its own, not a subclass of `pickle.Unpickler`: the standard one calls whatever callable lies
on its stack, sets attributes on it, and has a registry of extensions; here those powers do not exist. A name in the
stream becomes an immutable `Known` entry of the caller's table or the stream is refused; the only functions ever called
are the stand-ins of those entries; only plain dicts, lists and sets, made by this load, are ever changed.
Opcodes that protocols 2 to 5 do not need for plain data are refused (INST, OBJ, EXT*, PERSID, text opcodes, ...).
"""
import pickletools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO


class PickleRefused(ValueError):
    """The stream is damaged, or asks for something outside the closed list."""


class Buildable(ABC):
    """A stand-in object that accepts the BUILD opcode."""

    @abstractmethod
    def build(self, state: object) -> None:
        """Take over `state`; raise PickleRefused when it is not of the expected form."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A name that a stream may mention, and the function of ours that answers when the stream calls it."""
    name: str
    stand_in: Callable[..., object] | None = None  # None: may be mentioned, never called


KnownNames = Mapping[tuple[str, str], Known]  # (module, name) as written in the stream -> entry


def quote(value: object, limit: int = 80) -> str:
    """Show an untrusted value in a message: ASCII, one line, short."""
    if isinstance(value, (str, bytes)):
        value = value[:limit + 1]  # a value can be hundreds of megabytes
    text = ascii(value) if isinstance(value, (str, bytes, int, float, type(None))) else type(value).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


def load(stream: BinaryIO, known: KnownNames, persistent: Callable[[object], object] | None = None) -> object:
    """Read one pickle from `stream`, leaving it just behind the STOP opcode.

    known:      what the stream may name; everything else is refused before anything is called.
    persistent: answers persistent ids; None refuses them.
    Raises PickleRefused, and no other exception, for every stream that is not a complete pickle within the list.
    """
    machine = _Machine(known, persistent)
    try:
        for opcode, argument, position in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.result()
            step = _STEPS.get(opcode.name)
            if step is None:
                raise PickleRefused(f"opcode {opcode.name} at byte {position} is outside the closed list")
            step(machine, argument)
    except PickleRefused:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        # A damaged stream pops from an empty stack, misses a memo entry, holds invalid UTF-8 and so on; a stand-in
        # may get too few arguments, or ask torch for more than the machine has.
        raise PickleRefused(f"the pickle stream is damaged or cut off ({quote(str(error))})") from error
    raise PickleRefused("the pickle stream is damaged or cut off (no STOP opcode)")


class _Machine:
    """Stack, marks and memo of one load."""

    def __init__(self, known: KnownNames, persistent: Callable[[object], object] | None) -> None:
        self.known = known
        self.persistent = persistent
        self.stack: list[object] = []
        self.marks: list[int] = []  # heights of the stack at the open MARKs
        self.memo: dict[int, object] = {}

    def result(self) -> object:
        if len(self.stack) != 1 or self.marks:
            raise PickleRefused("the pickle stream is damaged (it ends with an unfinished object)")
        return self.stack[0]

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise PickleRefused("the pickle stream is damaged (it reaches below a MARK)")
        return self.stack.pop()

    def top(self) -> object:
        return self.stack[-1]

    def pop_to_mark(self) -> list[object]:
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def pop_several(self, count: int) -> list[object]:
        return [self.pop() for _ in range(count)][::-1]

    # Containers: exact types, so that nothing but what this load made can be changed.

    def extend_list(self, items: list[object]) -> None:
        self._target(list).extend(items)

    def extend_dict(self, items: list[object]) -> None:
        target = self._target(dict)
        if len(items) % 2:
            raise PickleRefused("the pickle stream is damaged (a dict key without a value)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[check_key(key)] = value

    def extend_set(self, items: list[object]) -> None:
        self._target(set).update(map(check_key, items))

    def _target(self, kind: type):
        if type(self.top()) is not kind:
            raise PickleRefused(f"the pickle stream is damaged (items for a {kind.__name__} go to {quote(self.top())})")
        return self.top()

    # Names and calls.

    def find(self, module: object, name: object) -> Known:
        entry = self.known.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if entry is None:
            raise PickleRefused(f"the name {quote(f'{module}.{name}')} is outside the closed list; nothing was run")
        return entry

    def find_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push(self.find(module, name))

    def find_stack_global(self) -> None:
        module, name = self.pop_several(2)
        self.push(self.find(module, name))

    def call(self) -> None:
        function, arguments = self.pop_several(2)
        if type(function) is not Known or function.stand_in is None:
            raise PickleRefused(f"it calls {quote(function)}, which is outside the closed list; nothing was run")
        if type(arguments) is not tuple:
            raise PickleRefused(f"it calls {function.name} with {quote(arguments)} in place of a tuple")
        self.push(function.stand_in(*arguments))

    def build(self) -> None:
        state = self.pop()
        if not isinstance(self.top(), Buildable):
            raise PickleRefused(f"it sets the state of {quote(self.top())}, which is outside the closed list")
        self.top().build(state)

    def resolve_id(self) -> None:
        if self.persistent is None:
            raise PickleRefused("it holds a persistent id, which is outside the closed list")
        self.push(self.persistent(self.pop()))

    def check_protocol(self, protocol: int) -> None:
        if not 2 <= protocol <= 5:
            raise PickleRefused(f"pickle protocol {protocol} is outside 2 to 5")


def check_key(key: object) -> object:
    """Accept str and int as keys and members: a deeply nested tuple would overflow the C stack when hashed."""
    if type(key) not in (str, int):
        raise PickleRefused(f"a dict or set has the key {quote(key)}; expected str or int")
    return key


def _steps() -> dict[str, Callable[[_Machine, object], None]]:
    """Tell what each accepted opcode does with the machine and the opcode's argument."""
    steps: dict[str, Callable] = {
        "PROTO": lambda m, protocol: m.check_protocol(protocol),
        "FRAME": lambda m, _: None,  # frames only help reading ahead
        "MARK": lambda m, _: m.marks.append(len(m.stack)),
        "NONE": lambda m, _: m.push(None),
        "NEWTRUE": lambda m, _: m.push(True),
        "NEWFALSE": lambda m, _: m.push(False),
        "EMPTY_TUPLE": lambda m, _: m.push(()),
        "EMPTY_LIST": lambda m, _: m.push([]),
        "EMPTY_DICT": lambda m, _: m.push({}),
        "EMPTY_SET": lambda m, _: m.push(set()),
        "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
        "TUPLE1": lambda m, _: m.push(tuple(m.pop_several(1))),
        "TUPLE2": lambda m, _: m.push(tuple(m.pop_several(2))),
        "TUPLE3": lambda m, _: m.push(tuple(m.pop_several(3))),
        "APPEND": lambda m, _: m.extend_list(m.pop_several(1)),
        "APPENDS": lambda m, _: m.extend_list(m.pop_to_mark()),
        "SETITEM": lambda m, _: m.extend_dict(m.pop_several(2)),
        "SETITEMS": lambda m, _: m.extend_dict(m.pop_to_mark()),
        "ADDITEMS": lambda m, _: m.extend_set(m.pop_to_mark()),
        "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.top()),
        "GLOBAL": lambda m, names: m.find_global(names),
        "STACK_GLOBAL": lambda m, _: m.find_stack_global(),
        "REDUCE": lambda m, _: m.call(),
        "NEWOBJ": lambda m, _: m.call(),  # a stand-in is a function: making and calling are one
        "BUILD": lambda m, _: m.build(),
        "BINPERSID": lambda m, _: m.resolve_id(),
    }
    for name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
                 "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"):
        steps[name] = lambda m, value: m.push(value)
    for name in ("BINPUT", "LONG_BINPUT"):
        steps[name] = lambda m, index: m.memo.__setitem__(index, m.top())
    for name in ("BINGET", "LONG_BINGET"):
        steps[name] = lambda m, index: m.push(m.memo[index])
    return steps


_STEPS = _steps()
