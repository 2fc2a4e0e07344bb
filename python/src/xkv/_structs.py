"""C structs as Python objects, and back."""
from __future__ import annotations

import dataclasses
from typing import Any, Dict, Mapping, Type, TypeVar

from ._native import ffi

T = TypeVar("T")


def value_of(field: Any) -> Any:
    """A field of a struct: numbers as they are, uint8_t[n] as bytes, char[n] as str."""
    if not isinstance(field, ffi.CData):
        return field
    kind = ffi.typeof(field)
    if kind.kind != "array":
        raise TypeError(f"no Python value for {kind.cname}")
    if kind.item.cname == "char":
        return ffi.string(field).decode("utf-8", "replace")
    if kind.item.cname == "uint8_t" or kind.item.cname == "unsigned char":
        return bytes(ffi.buffer(field))
    return tuple(field)


def record(kind: Type[T], struct: Any, **given: Any) -> T:
    """A dataclass from the struct's fields of the same names; `given` replaces some of them."""
    names = [f.name for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]
    values: Dict[str, Any] = {n: given[n] if n in given else value_of(getattr(struct, n)) for n in names}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.type in (bool, "bool"):
            values[field.name] = bool(values[field.name])
    return kind(**values)


def fill(struct: Any, options: Mapping[str, Any], names: Any) -> None:
    """Set the fields of an options struct that are in `names`; others are a TypeError, as for any Python function."""
    for name, value in options.items():
        if name not in names:
            raise TypeError(f"unexpected keyword argument '{name}'")
        setattr(struct, name, int(value) if isinstance(value, bool) else value)
