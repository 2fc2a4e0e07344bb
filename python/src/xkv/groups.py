"""What entries and dictionaries tell alike: their groups and their metadata."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple, Union

from ._native import ffi, lib
from ._structs import record

CODECS = {0: "lossless", 1: "svd", 2: "dict", 3: "scalar", 4: "svdq", 6: "cross"}
REASONS = ("asked", "no gain", "not finite", "exact kind", "no tokens", "not trained")

Value = Union[str, int, float, bytes]


@dataclass(frozen=True)
class GroupInfo:
    """Planes that are coded together. Of a dictionary's groups bytes of rows, energy and errors are 0."""

    codec: str                 # "lossless", "svd", "dict", "scalar", "svdq", "cross" (holds no planes)
    reason: Optional[str]      # lossless groups: why
    planes: Tuple[int, ...]    # indices into the geometry's, ascending
    errors: Tuple[float, ...]  # relative error of each
    rank: int
    width: int                 # elements of the group's row
    raw_bytes: int
    packed_bytes: int
    energy: float
    error: float


def groups_of(get: Any, pointer: Any, count: int) -> List[GroupInfo]:
    """get: xkv_entry_get_group or xkv_dict_get_group."""
    out, info = [], ffi.new("xkv_group_info *")
    for i in range(count):
        get(pointer, i, info)
        n = info.plane_count
        reason = REASONS[info.reason] if info.codec == 0 and info.reason < len(REASONS) else None
        out.append(record(GroupInfo, info, codec=CODECS.get(info.codec, str(info.codec)), reason=reason,
                          planes=tuple(info.planes[0:n]) if n else (),
                          errors=tuple(info.errors[0:n]) if n and info.errors else ()))
    return out


def check_group(group: int, count: int) -> None:
    if not 0 <= group < count:
        raise IndexError(f"group {group} of {count}")


def values_of(get: Any, pointer: Any, count: int) -> Dict[str, Value]:
    """get: xkv_entry_get_value or xkv_dict_get_value."""
    out: Dict[str, Value] = {}
    value = ffi.new("xkv_value *")
    for i in range(count):
        get(pointer, i, value)
        out[ffi.string(value.key).decode("utf-8", "replace")] = _value(value)
    return out


def _value(value: Any) -> Value:
    data = bytes(ffi.buffer(value.bytes, value.size)) if value.bytes and value.size else b""
    if value.type == lib.XKV_VALUE_U64:
        return int(value.u64)
    if value.type == lib.XKV_VALUE_F64:
        return float(value.f64)
    return data.decode("utf-8", "replace") if value.type == lib.XKV_VALUE_STRING else data
