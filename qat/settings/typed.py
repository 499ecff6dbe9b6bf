"""Values as people type them, spelled so that Hydra reads what was meant.

Hydra's grammar knows few characters beside ASCII letters and digits, takes any bracket for a list,
and reads 1.50 as a number where a name is asked for. So what a setting of text is given goes into
quotes wherever Hydra would read something else. Left to Hydra: commas, which separate the values of
a sweep, and what ``${`` refers to.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from decimal import Decimal
from os.path import expanduser
from types import UnionType
from typing import Any, get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException

from qat.errors import UserError

# Prose and paths of eval.py, taken as typed, commas too; of a path quotes around all of it go, as
# of any other.
VERBATIM_PATHS = ("artifact", "out", "run", "runs", "study", "cabinet", "model.path", "task_data")
FOLDER_KEY, FOLDER = "model", "model.path"  # of eval.py, where model= names a folder
VERBATIM_KEYS = (
    "prompt", *VERBATIM_PATHS, "submission.author", "submission.github_id", "submission.name",
    "submission.blurb",
)  # fmt: skip
SEARCHPATH = "hydra.searchpath"
CLOSING = {"[": "]", "(": ")", "{": "}"}
QUOTED = re.compile(r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?=\s*([],]|$))""")
WHOLE = re.compile(r"[+-]?\d[\d_]*(\.\d*)?([eE]\+?\d\d?)?")
WITH_COMMAS = re.compile(r"[+-]?\d{1,3}(,\d{3})+|0,\d+")
NOT_TEXT = (bool, int, float, list, dict)
UNITS = {"bytes": " of bytes, 1 MB = 1000000", "seconds": " of seconds, 1 min = 60"}


def kinds(schema: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type, of every setting and of every group of settings."""
    found: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for field in fields(schema):
        kind = hints[field.name]
        found[prefix + field.name] = kind
        if isinstance(kind, type) and is_dataclass(kind):
            found |= kinds(kind, f"{prefix}{field.name}.")
    return found


def _is(kind: Any, wanted: Any) -> bool:
    """Whether a type is the one wanted, or that or None."""
    return kind == wanted or (isinstance(kind, UnionType) and wanted in get_args(kind))


def in_quotes(text: str) -> str:
    """``text`` itself in the grammar of Hydra's overrides, whatever stands in it."""
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # it refers to no setting
    return QuotedString(plain, Quote.single).with_quotes()


def elements(text: str) -> list[str]:
    """What commas separate; those in quotes and in brackets do not."""
    found, start, here = [], 0, 0
    awaited: list[str] = []
    while here < len(text):
        letter, before = text[here], text[:here].rstrip()[-1:]
        if before in ("", ",", "[") and (quoted := QUOTED.match(text, here)):
            here = quoted.end()
            continue
        if letter in CLOSING and CLOSING[letter] in text[here:]:
            awaited.append(CLOSING[letter])
        elif awaited and letter == awaited[-1]:
            awaited.pop()
        elif letter == "," and not awaited:
            found.append(text[start:here])
            start = here + 1
        here += 1
    return [*found, text[start:]]


def _is_text(text: str, is_list: bool, is_option: bool) -> bool:
    """Whether Hydra reads text, or sweeps over it, or null."""
    try:
        value = OverridesParser.create().parse_override(f"x={text}").value()
    except HydraException:
        return False
    values: list[Any] = value.list if isinstance(value, ChoiceSweep) else [value]
    if is_list:
        values = [one for v in values for one in (v if isinstance(v, list) else [v])]
    return is_option or not any(isinstance(one, NOT_TEXT) for one in values)


def _as_text(text: str, is_list: bool, is_option: bool = False) -> str:
    if _is_text(text, is_list, is_option):
        return text
    spelled = []
    for element in map(str.strip, elements(text)):
        if is_list and element.startswith("[") and element.endswith("]"):
            spelled.append(f"[{_as_text(element[1:-1], False) if element != '[]' else ''}]")
        else:
            is_read = _is_text(element, False, False)
            spelled.append(
                element if is_read else QuotedString(element, Quote.single).with_quotes()
            )
    return ",".join(spelled)


def _as_whole(text: str) -> str:
    """1e7 and 8.0 are whole numbers, but Hydra's are then not."""
    if WHOLE.fullmatch(text) and (number := Decimal(text)) == int(number):
        return str(int(number))
    return text


def spelled(
    arguments: list[str], known: Mapping[str, Any], groups: Collection[str], is_sweep: bool
) -> list[str]:
    """Settings for Hydra. ``known``: name -> type; ``groups``: they take an option's name.

    UserError for a number that is written with commas.
    """
    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == FOLDER_KEY and FOLDER in known:
            name = FOLDER
        key = name.lstrip("+")
        kind = list[str] if key == SEARCHPATH else known.get(key)
        if key == SEARCHPATH:
            value = re.sub(r"(?<![^[,'\"/ ])~(?=/)", expanduser("~"), value)
        if not value:
            pass
        elif key in VERBATIM_KEYS and _is(kind, str):
            if not (key in VERBATIM_PATHS and QUOTED.fullmatch(value)):
                value = in_quotes(value)
        elif _is(kind, int) or _is(kind, float):
            if WITH_COMMAS.fullmatch(value) and (",0" in value or not is_sweep):
                one = value.replace(",", "." if value.startswith("0,") else "_")
                raise UserError(f"{argument}: commas separate several values; one is {name}={one}")
            if _is(kind, int):
                value = ",".join(map(_as_whole, value.split(",")))
        elif (is_list := _is(kind, list[str])) or _is(kind, str) or key in groups:
            value = _as_text(value, is_list, key in groups)
        found.append(f"{name}{equals}{value}")
    return found


def plain_number(typed: str) -> str:
    """What to give instead of ``setting=value`` if it begins like a number, else ''."""
    name, _, value = typed.partition("=")
    unit = UNITS.get(name.rpartition("_")[2], "")
    if re.fullmatch(r"[+-]?(inf|nan|[\d._]+(e[+-]?\d+)?)", value, re.IGNORECASE):
        return f"; give a whole number{unit}"  # any number will do for the other kind
    return f"; give a plain number{unit}" if re.match(r"[+-]?\.?\d", value) else ""
