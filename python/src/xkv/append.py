"""Appending: an entry of a cache that begins like another one's."""
from __future__ import annotations

from typing import Any, Optional, Union

from ._call import Callbacks, Context, Progress, borrowed, call_with
from ._files import to_bytes
from ._native import ffi, lib
from .cache import Cache, Planes
from .entry import Entry
from .packing import Packed, PackReport


def append(base: Entry, source: Union[Cache, Planes], *, zstd_level: int = 4, writer: Optional[str] = None,
           progress: Optional[Progress] = None) -> Packed:
    """Pack a whole cache whose first tokens are those of `base` without packing these again: bases, scales, step, tables
    and full chunks stay, and the tokens behind the last full chunk are coded with them.

    A base that needs a dictionary must have it attached, opened for packing. MismatchError: other planes,
    positions or token ids, or other rows in groups that are lossless."""
    report = ffi.new("xkv_pack_report *")
    o = ffi.new("xkv_append_options *", lib.xkv_append_options_default())
    name = ffi.new("char[]", writer.encode()) if writer is not None else ffi.NULL
    o.zstd_level, o.writer = zstd_level, name
    with borrowed() as context, Callbacks(progress) as callbacks:
        o.progress, o.progress_user = callbacks.progress, callbacks.user

        def write(context: Context, output: Any) -> None:
            if isinstance(source, Cache):
                call_with(context, lib.xkv_append_cache, base.entry_pointer, source.pointer, o, output, report)
            else:
                geometry, kept = source.geometry.to_c()
                call_with(context, lib.xkv_append, base.entry_pointer, geometry, source.views.pointer, ffi.NULL, ffi.NULL,
                          0, o, output, report)
                del kept
        data = to_bytes(write, context)
    return Packed(data, PackReport.from_c(report))
