"""The pickle of a ``final_model.int8.ptz``, looked at without running it.

``torch.load(weights_only=True)`` runs no code of a file's choice, but it builds what the file says:
a tuple of itself twice, sixty times over, takes a kilobyte to write and for ever to hash; a tuple
nested a million deep overflows the stack. So the stack of the pickle is followed here with the kind
of each value in its place: a tuple may hold flat ones, nothing is used twice but names and
tensors, and keys are text or numbers.
"""

from __future__ import annotations

import pickletools
from typing import Any, cast

MAX_PICKLE_BYTES = 1 << 20  # the reference's own has some 100 a tensor
# Kinds of values on the stack. A flat tuple holds text, names and numbers alone.
TEXT, NUMBER, STORAGE_NAME, MAKES_DICT, MAKES_TENSOR, EMPTY, FLAT, NESTED = range(8)
CONTAINER, STORAGE, TENSOR = range(8, 11)
# What the pickle of such a file calls, by pickle's own names.
MAY_NAME = {
    "collections OrderedDict": MAKES_DICT, "torch._utils _rebuild_tensor_v2": MAKES_TENSOR,
    **dict.fromkeys(("torch CharStorage", "torch FloatStorage", "torch HalfStorage"), STORAGE_NAME),
}  # fmt: skip
PUSHES = {
    "BINUNICODE": TEXT, "EMPTY_TUPLE": EMPTY, "EMPTY_DICT": CONTAINER, "EMPTY_LIST": CONTAINER,
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "NEWTRUE", "NEWFALSE"), NUMBER),
}  # fmt: skip
MAY_REPEAT = (TEXT, *MAY_NAME.values(), TENSOR)
CALLS = {(MAKES_DICT, EMPTY): CONTAINER, (MAKES_TENSOR, NESTED): TENSOR}
TAKES = {  # how many values; 0: all from the mark on
    "TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3,
    "SETITEM": 2, "SETITEMS": 0, "APPEND": 1, "APPENDS": 0,
}  # fmt: skip
KEYS = {TEXT, NUMBER}
REFUSED = "its pickle does what no file of weights does: refused"


def check_pickle(program: bytes) -> None:
    """ValueError unless ``program`` makes what torch.save makes of dicts of tensors by name."""
    if len(program) > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is longer than {MAX_PICKLE_BYTES} bytes")
    _check_names(program)
    try:
        if _result(program) != CONTAINER:
            raise ValueError(REFUSED)
    except LookupError:  # taken from an empty stack, or from no place of the memo
        raise ValueError(REFUSED) from None


def _check_names(program: bytes) -> None:
    try:
        for opcode, argument, _ in pickletools.genops(program):
            # STACK_GLOBAL and the like take the name from elsewhere; torch.save does not use them.
            if opcode.name == "GLOBAL" and argument in MAY_NAME:
                continue
            if "GLOBAL" in opcode.name or opcode.name in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
                raise ValueError(f"it would run {str(argument or opcode.name)[:80]!r}: refused")
            if opcode.name.startswith("EXT"):
                raise ValueError("it would run code of an extension: refused")
    except ValueError:
        raise
    except Exception as error:  # pickletools has many for damage, none of them named
        raise ValueError(f"it holds no torch file: {error}") from None


def _result(program: bytes) -> int:
    """The kind of what the program leaves; ValueError or LookupError at what none may do."""
    stacks: list[list[int]] = [[]]  # a mark begins another
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(program):
        name, value, stack = opcode.name, cast(Any, argument), stacks[-1]
        if name in PUSHES:
            stack.append(PUSHES[name])
        elif name == "GLOBAL":
            stack.append(MAY_NAME[value])
        elif name == "MARK":
            stacks.append([])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET") and memo[value] in MAY_REPEAT:
            stack.append(memo[value])
        elif name == "BINPERSID" and stack.pop() == FLAT:
            stack.append(STORAGE)
        elif name == "REDUCE":
            stack.append(CALLS[stack.pop(-2), stack.pop()])
        elif name in TAKES:
            count = TAKES[name]
            parts = [stack.pop() for _ in range(count)][::-1] if count else stacks.pop()
            is_tuple = name.startswith("TUPLE")
            has_odd_key = name.startswith("SET") and set(parts[::2]) - KEYS
            if has_odd_key or (NESTED in parts if is_tuple else stacks[-1][-1] != CONTAINER):
                raise ValueError(REFUSED)
            if is_tuple:
                stacks[-1].append(NESTED if set(parts) - {TEXT, NUMBER, STORAGE_NAME} else FLAT)
        elif name == "STOP" and len(stacks) == len(stack) == 1:
            return stack[0]
        elif name != "PROTO":
            raise ValueError(REFUSED)
    raise ValueError(REFUSED)
