"""A pickle read as data: nothing that it names is imported, and none of its functions is called.

A pickle is a program for a small stack machine, of which two instructions are dangerous: one
imports a name, the other calls it. Here a name is a text that is looked up in a table of our own
functions, and what the table lacks is refused. Everything a pickle can ask for is bounded by its
length: memory, depth of recursion, time.
"""

import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO

import numpy as np

# A file of weights has about ten thousand. Each makes an object of at most a few hundred bytes.
MAX_INSTRUCTIONS = 500_000
# Bytes that calls may make, beside those of the file twice: a short text can be encoded often.
MAX_BYTES = 100_000_000


class NotWeights(ValueError):
    """What is wrong with a file of weights, as the end of a sentence that its name begins."""


class Name(str):
    """What a pickle would import: "module.name"."""


class _Bounded:
    """A file whose `read` never asks for more than is left: lengths in a pickle can lie."""

    def __init__(self, file: BinaryIO, end: int):
        self.file, self.left = file, end - file.tell()

    def read(self, length: int) -> bytes:
        return self._count(self.file.read(min(length, self.left)))

    def readline(self) -> bytes:
        return self._count(self.file.readline(self.left))

    def _count(self, content: bytes) -> bytes:
        self.left -= len(content)
        return content


def read_pickle(
    file: BinaryIO,
    end: int,
    functions: Mapping[str, Callable | None],
    stored: Callable[[object], object] | None = None,
) -> object:
    """What the pickle at the file's position holds; the position moves behind it.

    Args:
        end: position in the file that is not read beyond.
        functions: our own function for each "module.name" that may be called, None for one that
            may only be named: `NUMPY`, for example. A text of Python 2 is decoded as latin-1.
        stored: what a persistent id stands for: a storage, which lies outside the pickle.
    Raises:
        NotWeights: it is not whole, is too long, names what is not in `functions`, or has an
            instruction that no data needs.
    """
    machine = _Machine(functions, stored, MAX_BYTES + 2 * end)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(_Bounded(file, end))):
            if count == MAX_INSTRUCTIONS:
                raise NotWeights(f"has more than {MAX_INSTRUCTIONS:,} instructions")
            machine.step(opcode.name, argument)
        (value,) = machine.stack
    except NotWeights:
        raise
    # Of the instructions above: too few on the stack, a wrong type, half an argument.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise NotWeights(f"is not a whole pickle ({error})") from error
    return value


class _Machine:
    """Stack, marks and memo of a pickle; see `pickletools` for what the instructions do."""

    def __init__(
        self, functions: Mapping, stored: Callable[[object], object] | None, max_bytes: int
    ):
        self.functions = functions
        self.stored = stored
        self.bytes_left = max_bytes
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, object] = {}

    def step(self, name: str, argument: object) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif name in _OF_MARK:
            self.stack = self.marks.pop()
            _OF_MARK[name](self.stack, stack)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(name[-1])
            stack[-length:] = [tuple(stack[-length:])]
        elif name == "APPEND":
            _extend(stack, [stack.pop()])
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack, [key, value])
        elif name == "BINPERSID" and self.stored:
            stack.append(self.stored(stack.pop()))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            self._spend(state)
            _build(stack[-1], state)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise NotWeights(f"has the instruction {name}, which no weights need")

    def _name(self, argument: str | None) -> None:
        if argument is None:
            name, module = self.stack.pop(), self.stack.pop()
        else:
            module, name = argument.split(" ", 1)
        if type(module) is not str or type(name) is not str:
            raise TypeError("the name of an import is no text")
        name = Name(f"{module}.{name}")
        if name not in self.functions:
            raise NotWeights(
                f"asks to import {name[:100]!r}, which is no part of weights (instead of a whole "
                "model save its state_dict())"
            )
        self.stack.append(name)

    def _call(self, function: object, arguments: object) -> object:
        ours = self.functions[function] if isinstance(function, Name) else None
        if ours is None or not isinstance(arguments, tuple):
            called = function if isinstance(function, Name) else type(function).__name__
            raise NotWeights(f"asks to call {called}, which is no part of weights")
        self._spend(arguments)
        return ours(*arguments)

    def _spend(self, values: Iterable) -> None:
        """The memory that is made of these: a byte of a text, an object of a container."""
        for value in values:
            if isinstance(value, str | bytes | bytearray):
                self.bytes_left -= len(value)
            elif isinstance(value, tuple | list | dict):
                self.bytes_left -= 100 * len(value)
        if self.bytes_left < 0:
            raise NotWeights("asks for more memory than its own length")


_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}


def _extend(stack: list, items: list) -> None:
    if type(stack[-1]) is not list:
        raise TypeError(f"a {type(stack[-1]).__name__} is no list")
    stack[-1].extend(items)


def check_plain(items: list) -> None:
    """Refuse (TypeError) what is no text or number as the key of a dict or the item of a set."""
    for item in items:
        if type(item) not in (str, int, float, bool, type(None)):
            raise TypeError(f"a {type(item).__name__} is the key of a dict or the item of a set")


def _set_items(stack: list, items: list) -> None:
    if type(stack[-1]) is not dict:
        raise TypeError(f"a {type(stack[-1]).__name__} is no dict")
    # Not a tuple, whose hash recurses as deep as it is nested.
    check_plain(items[::2])
    stack[-1].update(zip(items[::2], items[1::2], strict=True))


_OF_MARK: dict[str, Callable[[list, list], None]] = {
    "TUPLE": lambda stack, items: stack.append(tuple(items)),
    "LIST": lambda stack, items: stack.append(items),
    "DICT": lambda stack, items: (stack.append({}), _set_items(stack, items)),
    "APPENDS": _extend,
    "SETITEMS": _set_items,
    "POP_MARK": lambda stack, items: None,
}


def _build(value: object, state: object) -> None:
    """Give a new array or dtype its contents."""
    if isinstance(value, np.ndarray):
        _, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, np.dtype):
            raise TypeError("an array has no dtype")
        content = content if isinstance(content, bytes) else encode_latin1(content, "latin-1")
        # It compares the length of the content with the shape.
        value.__setstate__((1, _shape(shape), dtype, bool(is_fortran), content))
    elif isinstance(value, np.dtype):
        # Of the state only the order of the bytes: the rest is of arrays that are no numbers.
        value.__setstate__((3, state[1], None, None, None, -1, -1, 0))
    elif not isinstance(value, dict):  # the attributes of an OrderedDict are nothing that we need
        raise NotWeights(f"asks to change a {type(value).__name__}, which no weights need")


def _shape(shape: object) -> tuple[int, ...]:
    if type(shape) is not tuple or any(type(n) is not int or n < 0 for n in shape):
        raise TypeError("the shape of an array is no tuple of whole numbers")
    return shape


def ordered_dict(items: list = ()) -> dict:
    """Python 2 gives the items as a list of pairs."""
    stack = [{}]
    _set_items(stack, [x for key, value in items for x in (key, value)])
    return stack[0]


def encode_latin1(text: str, encoding: str) -> bytes:
    if encoding.lower() not in ("latin1", "latin-1"):
        raise TypeError(f"bytes as a text in {encoding[:20]!r}")
    return text.encode("latin-1")


def _dtype(code: str, *_: object) -> np.dtype:
    if type(code) is not str or code[:1] not in "biufc" or not code[1:].isdecimal():
        raise NotWeights("has an array of what is no numbers")
    return np.dtype(code, copy=True)  # a new one, that its state may be set


def _scalar(dtype: np.dtype, content: bytes | str) -> np.generic:
    content = content if isinstance(content, bytes) else encode_latin1(content, "latin-1")
    (value,) = np.frombuffer(content, _is_dtype(dtype))
    return value


def _is_dtype(dtype: object) -> np.dtype:
    if not isinstance(dtype, np.dtype):
        raise TypeError("an array has no dtype")
    return dtype


def _frombuffer(
    content: bytes | bytearray, dtype: np.dtype, shape: tuple[int, ...], order: str
) -> np.ndarray:
    if not isinstance(content, bytes | bytearray):
        raise TypeError("an array without its bytes")
    return np.frombuffer(content, _is_dtype(dtype)).reshape(_shape(shape), order=order).copy("K")


_OF_ARRAYS: dict[str, Callable | None] = {
    # The array that it makes is empty; its contents come with `_build`.
    "multiarray._reconstruct": lambda *_: np.ndarray((0,), np.int8),
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _frombuffer,
}
# numpy 2 calls `core` another name.
NUMPY: dict[str, Callable | None] = {
    **{f"numpy.{core}.{name}": x for core in ("core", "_core") for name, x in _OF_ARRAYS.items()},
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    # What Python 3 writes for bytes in an old protocol.
    "_codecs.encode": encode_latin1,
    "__builtin__.bytes": lambda: b"",
    "collections.OrderedDict": ordered_dict,
}
