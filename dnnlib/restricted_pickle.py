"""Read pickles of untrusted files: nothing that they name is imported or called.

A pickle is a program that names functions and calls them. Here a name that is in the caller's list becomes a `Name`,
and a call becomes a `Call`: a record of what the file asks for, which the caller interprets.

This extends pickle._Unpickler, Python's own reader written in Python, because its opcodes can be restricted. The usual
one, in C, cannot be kept from allocating a memo of the declared size, setting attributes, using copyreg's cache of
extensions, or hashing nested tuples, where a few bytes overflow the C stack or keep it busy forever.
"""
import pickle
import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import BinaryIO

# A file of three networks for 1024 x 1024 has about 30,000 opcodes, as does a batch of CIFAR-10. An opcode makes at
# most one small object, or copies bytes of the file.
_MAX_OPCODES = 500_000
_MAX_ARGUMENTS = 8  # of a call; torch._utils._rebuild_tensor_v2 has the most, 6 or 7
_LONGEST_QUOTE = 80  # characters of an untrusted value in a message

# What plain data and calls need in protocols 2 to 5, with the str of Python 2.
_OPCODES = frozenset("""
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE
    BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 SHORT_BINSTRING BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS MEMOIZE BINPUT LONG_BINPUT BINGET
    LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID""".split())
_KEYS = {"SETITEM": slice(-2, -1), "SETITEMS": slice(None, None, 2), "ADDITEMS": slice(None)}  # places on the stack
_DICTS = {"collections.OrderedDict", "dnnlib.util.EasyDict"}  # made empty, then filled as a dict is
_WITH_STATE = {"numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}


class PickleRefused(ValueError):
    """The file is damaged, or asks for something that its reader does not expect."""


@dataclass(frozen=True, eq=False)
class Name:
    """A function or class that a pickle names, such as "numpy.ndarray"; it was not imported."""
    text: str


@dataclass(eq=False)
class Call:
    """A call that a pickle asks for; it was not made."""
    name: str
    arguments: tuple
    state: object = None  # what the pickle gives to the result's __setstate__


def load(stream: BinaryIO, names: Collection[str] = (), *, persistent_ids: bool = False,
         max_opcodes: int = _MAX_OPCODES) -> object:
    """Read one pickle of None, bool, int, float, str, bytes, list, tuple, set, dict, Name and Call.

    names:          the names that the pickle may contain, with their modules
    persistent_ids: whether it may refer to outside objects, which become Call("persistent id", (id,))
    max_opcodes:    limit on time and memory
    Raises PickleRefused, and no other exception, for everything else. Keys are str or small int; the str of Python 2 is
    read as latin-1; an OrderedDict or EasyDict becomes a dict.
    """
    try:
        return _Unpickler(stream, names, persistent_ids, max_opcodes).load()
    except PickleRefused:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise PickleRefused(f"it is not a pickle, or damaged or cut off ({quote(str(error))})") from error


def quote(value: object) -> str:
    """Show an untrusted value in a message: ASCII, one line, short."""
    if isinstance(value, (str, bytes)):
        value = value[:_LONGEST_QUOTE + 1]  # a value can be hundreds of megabytes
    if isinstance(value, (Name, Call)):
        return value.text if isinstance(value, Name) else f"{value.name}(...)"
    text = ascii(value) if isinstance(value, (str, bytes, int, float, type(None))) else type(value).__name__
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


def _restrict(code: int, function: Callable) -> Callable:
    """Return the method for an opcode, with what is checked before it."""
    opcode = pickletools.code2op[chr(code)].name
    keys = _KEYS.get(opcode, slice(0))

    def step(self: "_Unpickler") -> None:
        if opcode not in _OPCODES:
            raise PickleRefused(f"it has the opcode {opcode}, which is not allowed")
        self.num_opcodes += 1
        if self.num_opcodes > self.max_opcodes:
            raise PickleRefused(f"it has more than {self.max_opcodes:,} opcodes")
        for key in self.stack[keys]:
            # Large int can be chosen to collide, so that a dict of them takes minutes.
            if type(key) is not str and not (type(key) is int and 0 <= key < 2**20):
                raise PickleRefused(f"a dict or set has the key {quote(key)}; expected a string or a small number")
        function(self)

    return step


class _Unpickler(pickle._Unpickler):
    def __init__(self, stream: BinaryIO, names: Collection[str], persistent_ids: bool, max_opcodes: int) -> None:
        super().__init__(stream, encoding="latin-1")
        self.names, self.persistent_ids = names, persistent_ids
        self.num_opcodes, self.max_opcodes = 0, max_opcodes

    def find_class(self, module: str, name: str) -> Name:
        text = f"{module}.{name}"
        if text not in self.names:
            raise PickleRefused(f"it names {quote(text)}, which is not allowed; nothing was run")
        return Name(text)

    def persistent_load(self, identity: object) -> Call:
        if not self.persistent_ids:
            raise PickleRefused("it has a persistent id, which is not allowed")
        return Call("persistent id", (identity,))

    def make_call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(arguments) is not tuple:
            raise PickleRefused(f"it calls {quote(name)} with {quote(arguments)}; expected a name and a tuple")
        if len(arguments) > _MAX_ARGUMENTS:  # callers may go through them for each of thousands of references
            raise PickleRefused(f"it calls {quote(name)} with {len(arguments):,} arguments")
        self.append({} if name.text in _DICTS and not arguments else Call(name.text, arguments))

    def set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Call or target.name not in _WITH_STATE or target.state is not None:
            raise PickleRefused(f"it sets the state of {quote(target)}, which is not allowed")
        target.state = state

    dispatch = {code: _restrict(code, function) for code, function in {  # noqa: RUF012  read-only, as in the base class
        **pickle._Unpickler.dispatch, pickle.REDUCE[0]: make_call, pickle.NEWOBJ[0]: make_call,
        pickle.BUILD[0]: set_state}.items()}
