"""Pickled plain data, read without unpickling.

A pickle is a program: `pickle.load` imports and calls whatever the file names. Here its opcodes are walked by an
interpreter that knows containers, strings, numbers and the reconstruction of uint8 NumPy arrays, as NumPy wrote them
under Python 2 and 3 in protocols 0 to 4. It imports nothing; every other opcode or global is refused.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fpsim.data.errors import DataError


@dataclass(frozen=True)
class _Global:
    """A name that the pickle mentions: never imported."""

    module: str
    name: str


@dataclass(frozen=True)
class _UInt8:
    """A reconstructed dtype; the only one there is."""


class _RefusedError(Exception):
    """The pickle asks for something that plain data does not need."""


NDARRAY = _Global("numpy", "ndarray")


def read_pickle(path: Path) -> Any:
    """The dicts, lists, tuples, numbers, strings and uint8 arrays pickled in `path`. A str of Python 2 comes as bytes.

    Raises DataError if the pickle is damaged or holds anything else.
    """
    try:
        return _interpret(path.read_bytes())
    except _RefusedError as error:
        raise DataError(f"{path}: refused: {error}; only plain data and uint8 arrays are read") from error
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged or not a pickle: {error}") from error


def _interpret(content: bytes) -> Any:
    stack: list[Any] = []
    below_marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    argument: Any  # of the opcode: int, str or bytes

    def pop_to_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below_marks.pop()
        return items

    for opcode, argument, _ in pickletools.genops(content):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                below_marks.append(stack)
                stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1":
                stack.append(argument)
            case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument.encode("latin-1"))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                items = pop_to_mark()
                stack.append(items)
            case "APPEND":
                item = stack.pop()
                _top(stack, list).append(item)
            case "APPENDS":
                items = pop_to_mark()
                _top(stack, list).extend(items)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                if len(stack) < size:
                    raise IndexError("pop from an empty stack")
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                items = pop_to_mark()
                stack.append(tuple(items))
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = pop_to_mark()
                stack.append(dict(zip(items[::2], items[1::2], strict=True)))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _top(stack, dict)[key] = value
            case "SETITEMS":
                items = pop_to_mark()
                _top(stack, dict).update(zip(items[::2], items[1::2], strict=True))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_known(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_known(module, name))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case unknown:
                raise _RefusedError(f"opcode {unknown}")
    raise ValueError("no STOP opcode")  # genops says so first


def _top(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise TypeError(f"{kind.__name__} expected, got {type(stack[-1]).__name__}")
    return stack[-1]


def _reconstruct(kind: object, shape: object, type_code: object) -> np.ndarray:
    if kind != NDARRAY or shape != (0,) or type_code != b"b":
        raise _RefusedError(f"an array that starts as {kind}, {shape}, {type_code!r}")
    return np.empty(0, np.uint8)  # its state follows in a BUILD


def _dtype(code: object, align: object, copy: object) -> _UInt8:
    if code not in ("u1", b"u1"):
        raise _RefusedError(f"an array of dtype {code!r}")
    return _UInt8()


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise _RefusedError(f"_codecs.encode with encoding {encoding!r}")
    return text.encode("latin-1")


CALLS: dict[_Global, Callable[..., Any]] = {
    _Global("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    _Global("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    _Global("numpy", "dtype"): _dtype,
    _Global("_codecs", "encode"): _encode,
}


def _known(module: object, name: object) -> _Global:
    if isinstance(module, str) and isinstance(name, str):
        mentioned = _Global(module, name)
        if mentioned == NDARRAY or mentioned in CALLS:
            return mentioned
    raise _RefusedError(f"the global {module}.{name}")


def _call(function: object, arguments: object) -> Any:
    if not isinstance(function, _Global) or function not in CALLS or not isinstance(arguments, tuple):
        raise _RefusedError(f"a call of {function}")
    return CALLS[function](*arguments)


def _build(target: object, state: Any) -> None:
    """Gives the state that follows a reconstruction: a dtype's says nothing new; an array's is filled in place."""
    if isinstance(target, _UInt8):
        return
    if not isinstance(target, np.ndarray):
        raise _RefusedError(f"a state for a {type(target).__name__}")
    version, shape, dtype, is_fortran, content = state
    sizes_valid = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    if version != 1 or not sizes_valid or not isinstance(dtype, _UInt8) or type(content) is not bytes:
        raise ValueError("not the state of a uint8 array")
    if math.prod(shape) != len(content):
        raise ValueError(f"an array of shape {shape} with {len(content)} bytes")
    array: Any = target  # NumPy's stub wants a numpy.bool, its code a bool
    array.__setstate__((1, shape, np.dtype(np.uint8), bool(is_fortran), content))
