"""One JSON object of a checkpoint, read key by key: each with the type it needs, each refused by file and name.

JSON files of checkpoints are edited by hand and re-saved by many tools, so a number may come as a text, a boolean or
null. What a key may hold is said where it is read; a null stands for "not said" where the reader allows it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from executor.errors import UserError


class _Required:
    """The default of a key that must be there."""


REQUIRED = _Required()


class Fields:
    """The object `values` of `file`; `section` is its dotted path there, empty for the whole file.

    `texts`: numbers may be written as texts, "3136".
    Every method raises UserError, with file, section and key, for a value that is not what it reads. `default` is
    returned for an absent key, and for a null where `null` allows it.
    """

    def __init__(self, values: Mapping[str, Any], file: str, section: str = "", *, texts: bool = False) -> None:
        self.values, self.file, self.path, self.texts = values, file, section, texts

    def __contains__(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def fault(self, key: str, wanted: str) -> UserError:
        """The error for `key`, to be raised."""
        name = f"{self.path}.{key}" if self.path else key
        got = f"is {_shown(self.values[key])}" if key in self.values else "is missing"
        return UserError(f"{self.file}: {name} {got}, wanted {wanted}")

    def whole(self, key: str, default: Any = REQUIRED, *, least: int = 1, null: bool = False) -> Any:
        """A whole number of at least `least`; 3.0 is one."""
        wanted = f"a whole number, at least {least}"
        value = self._raw(key, default, null, wanted)
        if value is default:
            return default
        number = as_whole(value)
        if number is None or number < least:
            raise self.fault(key, wanted)
        return number

    def number(self, key: str, default: Any = REQUIRED, *, null: bool = False, zero: bool = False) -> Any:
        """A finite number above 0, or from 0 on."""
        wanted = "a number, at least 0" if zero else "a number above 0"
        value = self._raw(key, default, null, wanted)
        if value is default:
            return default
        if not is_number(value) or value < 0 or (value == 0 and not zero):
            raise self.fault(key, wanted)
        return float(value)

    def flag(self, key: str, default: Any = REQUIRED, *, null: bool = True) -> Any:
        """true or false."""
        value = self._raw(key, default, null, "true or false")
        if value is not default and not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def text(self, key: str, default: Any = REQUIRED, *, null: bool = True) -> Any:
        value = self._raw(key, default, null, "a text")
        if value is not default and not isinstance(value, str):
            raise self.fault(key, "a text")
        return value

    def wholes(
        self,
        key: str,
        default: Any = REQUIRED,
        *,
        least: int = 0,
        length: int | None = None,
        below: int | None = None,
        null: bool = False,
    ) -> Any:
        """A list of whole numbers from `least` to under `below`, `length` of them; as a tuple."""
        count = "" if length is None else f"{length} "
        until = "" if below is None else f" and below {below}"
        wanted = f"a list of {count}whole numbers, each at least {least}{until}"
        value = self._raw(key, default, null, wanted)
        if value is default:
            return default
        numbers = [as_whole(entry) for entry in value] if isinstance(value, list | tuple) else [None]
        if any(number is None or number < least or (below is not None and number >= below) for number in numbers):
            raise self.fault(key, wanted)
        if length is not None and len(numbers) != length:
            raise self.fault(key, wanted)
        return tuple(numbers)

    def section(self, key: str) -> "Fields | None":
        """The object under `key`; None where it is absent, null or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.fault(key, "an object in braces")
        return Fields(value, self.file, f"{self.path}.{key}" if self.path else key, texts=self.texts)

    def only(self, key: str, allowed: Iterable[Any], why: str) -> None:
        """Refuse a value that is said and not among `allowed`; `why` says what this code computes instead."""
        if key in self and not any(type(self.values[key]) is type(a) and self.values[key] == a for a in allowed):
            raise self.fault(key, why)

    def _raw(self, key: str, default: Any, null: bool, wanted: str) -> Any:
        if key not in self.values or (null and self.values[key] is None):
            if default is REQUIRED:
                raise self.fault(key, wanted)
            return default
        value = self.values[key]
        if self.texts and isinstance(value, str):
            number = as_number(value)
            return value if number is None else number
        return value


def is_number(value: Any) -> bool:
    """A finite number of at most 64 bits that is no boolean."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def as_number(value: Any) -> float | None:
    """The number that `value` is or that is written in it, None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if is_number(value) else None


def as_whole(value: Any) -> int | None:
    """The whole number that `value` is, None for anything else."""
    return int(value) if is_number(value) and value == int(value) else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
