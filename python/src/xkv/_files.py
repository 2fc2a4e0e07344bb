"""Inputs and outputs: paths and bytes."""
from __future__ import annotations

import os
from typing import Any, Callable, Tuple, Union

from ._call import Context, call, call_with
from ._native import ffi, lib

Path = Union[str, "os.PathLike[str]"]
Readable = Union[bytes, bytearray, memoryview]
Source = Union[Path, Readable]
Span = Union[None, int, slice, range]  # all, so many leading ones, or a slice or range of step 1


def encoded(path: Path) -> bytes:
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte in a path")
    return name


class Input:
    """An xkv_input over a file (kept open) or over bytes (kept, not copied)."""

    def __init__(self, source: Source) -> None:
        self.pointer = ffi.new("xkv_input *")
        self._open = False
        if isinstance(source, (bytes, bytearray, memoryview)):
            self._data = ffi.from_buffer("uint8_t[]", source)
            self.pointer[0] = lib.xkv_input_from_memory(self._data, len(self._data))
        else:
            name = encoded(source)
            self._data = ffi.new("char[]", name)
            call(lib.xkv_input_open, self._data, self.pointer)
            self._open = True

    def __del__(self) -> None:
        if self._open:
            self._open = False
            call(_close_input, self.pointer)


def _close_input(ctx: Any, pointer: Any) -> int:
    lib.xkv_input_close(ctx, pointer)
    return int(lib.XKV_OK)


Write = Callable[[Context, Any], None]  # with a context and an xkv_output *


def to_bytes(write: Write, context: Context) -> bytes:
    """What `write` writes."""
    buffer = ffi.new("xkv_py_buffer *")
    try:
        write(context, ffi.new("xkv_output *", lib.xkv_py_buffer_output(buffer)))
        return bytes(ffi.buffer(buffer.data, buffer.size)) if buffer.size else b""
    finally:
        lib.xkv_py_buffer_free(buffer)


def to_file(write: Write, context: Context, path: Path, overwrite: bool) -> None:
    """The same into a file that appears when it is complete."""
    file = _create(context, path, overwrite)
    try:
        write(context, ffi.new("xkv_output *", lib.xkv_file_output(file)))
    except BaseException:
        lib.xkv_file_abort(context.pointer, file)
        raise
    call_with(context, lib.xkv_file_commit, file)


def to_mapped_file(fill: Callable[[Context, Any], None], size: int, context: Context, path: Path,
                   overwrite: bool) -> None:
    """A file of `size` bytes that `fill` fills through a uint8_t *."""
    file = _create(context, path, overwrite)
    try:
        data = ffi.new("uint8_t **")
        call_with(context, lib.xkv_file_map, file, size, data)
        fill(context, data[0])
    except BaseException:
        lib.xkv_file_abort(context.pointer, file)
        raise
    call_with(context, lib.xkv_file_commit, file)


def _create(context: Context, path: Path, overwrite: bool) -> Any:
    made = ffi.new("xkv_file **")
    call_with(context, lib.xkv_file_create, encoded(path), overwrite, made)
    return made[0]


def span(tokens: Span, total: int, what: str) -> Tuple[int, int]:
    """(first, count) of None (all), a number of leading ones, a slice or a range of step 1. Never empty."""
    if tokens is None:
        first, end = 0, total
    elif isinstance(tokens, slice):
        first, end, step = tokens.indices(total)
        if step != 1:
            raise ValueError(f"{what}: step {step}, expected 1")
    elif isinstance(tokens, range):
        if tokens.step != 1:
            raise ValueError(f"{what}: step {tokens.step}, expected 1")
        first, end = tokens.start, tokens.stop
    else:
        first, end = 0, int(tokens)
    if not 0 <= first < end <= total:
        raise ValueError(f"{what}: {first} to {end}, of {total}")
    return first, end - first
