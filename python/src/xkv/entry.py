"""Entries: packed prefixes, opened, read in part or whole, restored as the engine's file."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import numpy.typing as npt

from ._arrays import Array, Views, empty_planes
from ._call import Callbacks, Context, Handle, Owner, Progress, borrowed, call, call_with
from ._files import Input, Path, Source, Span, span, to_mapped_file
from ._native import ffi, lib
from ._structs import record
from .dictionary import Dictionary
from .geometry import NUMPY_TYPES, Geometry, Tokens, index_of, int32_array, pointer_to
from .groups import GroupInfo, Value, check_group, groups_of, values_of
from .model import Model
from .packing import Packed
from .pages import Pages, PageViews

COMPONENT = np.dtype([("bits", np.float64), ("deviation", np.float64), ("table", np.uint32)], align=True)


@dataclass(frozen=True)
class EntryInfo:
    """Sizes and settings of an entry."""

    file_size: int
    raw_bytes: int        # of the cache's tensors as the engine holds them
    raw16_bytes: int      # the same at 16 bits an element
    payload_bytes: int
    framing_bytes: int
    token_bytes: int
    content_id: bytes     # 16 bytes
    source_hash: bytes    # XXH3-128 of the engine's file; zero without one
    write_version: int
    read_version: int
    sinks: int
    window: int
    chunk_tokens: int
    chunk_count: int
    group_count: int
    lossless: bool        # every group is
    needs_dict: bool
    dictionary_id: bytes  # its content id; zero when it needs none


@dataclass(frozen=True)
class GroupCoding:
    """How a group is quantized; zero for codecs that do not."""

    step: float
    coded: int  # of the group's `rank` components


class EntryReader:
    """Reading of an entry, by itself or behind a store's hit."""

    geometry: Geometry

    @property
    def entry_pointer(self) -> Any:
        raise NotImplementedError

    def _read(self, context: Context, options: Any, views: Any) -> None:
        call_with(context, lib.xkv_entry_read, self.entry_pointer, options, views)

    def _token_limit(self) -> int:
        return self.geometry.tokens

    @property
    def info(self) -> EntryInfo:
        info = ffi.new("xkv_entry_info *")
        lib.xkv_entry_get_info(self.entry_pointer, info)
        return record(EntryInfo, info)

    @property
    def groups(self) -> List[GroupInfo]:
        """In the order in which they are read."""
        return groups_of(lib.xkv_entry_get_group, self.entry_pointer, self.info.group_count)

    def coding(self, group: int) -> GroupCoding:
        """Read how a group is quantized; the dictionary is not needed."""
        check_group(group, self.info.group_count)
        coding = ffi.new("xkv_group_coding *")
        call(lib.xkv_entry_read_coding, self.entry_pointer, group, coding)
        return record(GroupCoding, coding)

    def components(self, group: int) -> npt.NDArray[Any]:
        """[rank] of a group of codec dict, cross, scalar or svdq, each with `bits` (exact code length of its integers),
        `deviation` (root mean square of its coefficients as decoded) and `table`; all 0 where it is not coded. Decodes the
        group's integers, for which the dictionary is not needed. ValueError: another codec."""
        check_group(group, self.info.group_count)
        out = np.zeros(self.groups[group].rank, COMPONENT)
        call(lib.xkv_entry_read_components, self.entry_pointer, group, ffi.cast("xkv_component *", out.ctypes.data))
        return out

    def part_sizes(self, group: int) -> Tuple[int, ...]:
        """Bytes of a group's side part, of its exact rows, and of each of its chunks."""
        check_group(group, self.info.group_count)
        return tuple(int(lib.xkv_entry_part_size(self.entry_pointer, group, part))
                     for part in range(2 + self.info.chunk_count))

    @property
    def whole_only(self) -> bool:
        """Whether restore() gives all tokens or none: of a window that has slid, earlier ones are not there. Planes can be
        read in part all the same; False without an engine's file."""
        framing, out = lib.xkv_entry_framing(self.entry_pointer), ffi.new("uint32_t *")
        if framing:
            call(lib.xkv_framing_is_whole_only, framing, lib.xkv_entry_geometry(self.entry_pointer), out)
        return bool(out[0])

    @property
    def values(self) -> Dict[str, Value]:
        """The metadata: model, engine, writer, settings."""
        count = lib.xkv_entry_value_count(self.entry_pointer)
        return values_of(lib.xkv_entry_get_value, self.entry_pointer, count)

    def check_model(self, model: Model) -> None:
        """MismatchError: another model made it. Fingerprints are compared, else layers and widths."""
        call(lib.xkv_entry_check_model, self.entry_pointer, model.pointer)

    def read(self, tokens: Span = None, groups: Span = None, *, out: Optional[Sequence[Any]] = None,
             rows: Optional[Any] = None, positions: Optional[Tokens] = None, dtype: Optional[str] = None,
             heads: Span = None, on_group: Any = None, progress: Optional[Progress] = None) -> List[Any]:
        """Restore tokens of groups: one array [tokens, heads, head_dim] for each plane of the geometry, None for planes
        of other groups. Only the chunks that hold the tokens are read; all is checked before it is handed out.

        tokens, groups: None for all, a number of leading ones, a slice or a range.
        out: arrays to fill instead of new ones (None for planes that are not asked for): numpy, torch, anything with
            DLPack or the buffer protocol, of any strides and of float32, float16, bfloat16. Or Pages, which get the tokens
            where the sequence has them.
        rows: [tokens] where to put them in `out`, for paged caches.
        dtype: of new arrays: "f32", "f16", "bf16" (bits as uint16); by default the plane's own, f32 for
            planes in blocks.
        positions: [tokens] that K is rotated for; by default those it was computed at.
        heads: KV heads of each plane, for one rank of several (tensor parallelism): arrays hold these alone, and only
            their part of the arithmetic is done. Likewise a number, a slice or a range; not with Pages. What all heads
            share, the latents of MLA, comes whole.
        on_group(group): called when all asked tokens of a group are in place, in order; an exception stops the call.
        On any error the contents of `out` are undefined."""
        first, count = span(tokens, self._token_limit(), "tokens")
        infos = self.groups
        first_group, group_count = span(groups, len(infos), "groups")
        asked = {i for info in infos[first_group:first_group + group_count] for i in info.planes}
        wanted = [i in asked for i in range(len(self.geometry.planes))]
        if dtype is not None:
            index_of(tuple(NUMPY_TYPES), dtype, "dtype")
        geometry, first_head, head_count = self.geometry, 0, 0
        if heads is not None:
            geometry, first_head, head_count = _with_heads(geometry, heads)
        arrays: Sequence[Any]
        views: Union[Views, PageViews]
        if out and all(isinstance(pages, Pages) for pages in out):
            if heads is not None:
                raise ValueError("heads: not into Pages")
            arrays, views = out, PageViews(self.geometry, out, first, count, writable=True)
        else:
            arrays = empty_planes(geometry, wanted, count, dtype) if out is None else _chosen(out, wanted)
            views = Views(geometry, arrays, count, rows, writable=True)
        o = ffi.new("xkv_read_options *", lib.xkv_read_options_default())
        o.first_token, o.token_count, o.first_group, o.group_count = first, count, first_group, group_count
        o.first_head, o.head_count = first_head, head_count
        at = int32_array(positions, "positions") if positions is not None else None
        if at is not None:
            if len(at) != count:
                raise ValueError(f"positions: {len(at)}, expected {count}")
            o.positions = pointer_to(at)
        with borrowed() as context, Callbacks(progress, on_group) as callbacks:
            o.progress, o.progress_user = callbacks.progress, callbacks.user
            o.group_ready, o.group_ready_user = callbacks.group_ready, callbacks.user
            self._read(context, o, views.pointer)
        return list(arrays)

    def restored_size(self, tokens: int = 0) -> int:
        """Bytes of the engine's file for the first tokens (0: all)."""
        size = ffi.new("uint64_t *")
        call(lib.xkv_entry_restored_size, self.entry_pointer, tokens, size)
        return int(size[0])

    def restore(self, tokens: int = 0, *, progress: Optional[Progress] = None) -> bytearray:
        """The engine's file for the first tokens (0: all)."""
        image = bytearray(self.restored_size(tokens))
        with borrowed() as context:
            self._restore(context, tokens, ffi.from_buffer("uint8_t[]", image), len(image), progress)
        return image

    def restore_file(self, path: Path, tokens: int = 0, *, overwrite: bool = False,
                     progress: Optional[Progress] = None) -> None:
        """The same as a file, which appears when it is complete. FileExistsError unless `overwrite`."""
        size = self.restored_size(tokens)
        with borrowed() as context:
            to_mapped_file(lambda c, data: self._restore(c, tokens, data, size, progress), size, context, path, overwrite)

    def _restore(self, context: Context, tokens: int, image: Any, size: int, progress: Optional[Progress]) -> None:
        with Callbacks(progress) as callbacks:
            call_with(context, lib.xkv_entry_restore, self.entry_pointer, tokens, callbacks.progress, callbacks.user,
                      image, size)


class Entry(Owner, EntryReader):
    """An opened entry (.xkv). May be read by several threads at once."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self.geometry = Geometry.from_c(lib.xkv_entry_geometry(handle.pointer))

    def __enter__(self) -> Entry:
        return self

    def __repr__(self) -> str:
        info = self.info
        return f"<xkv.Entry {info.content_id.hex()}, {self.geometry.tokens} tokens, {info.file_size} bytes>"

    @property
    def entry_pointer(self) -> Any:
        """xkv_entry *"""
        return self._handle.pointer

    def attach(self, dictionary: Dictionary) -> None:
        """Give it the dictionary it was packed with. MismatchError: it is another one."""
        call_with(self._handle.context, lib.xkv_entry_attach, self._handle.pointer, dictionary.pointer)
        self._handle.keep += (dictionary,)

    def verify(self, progress: Optional[Progress] = None) -> None:
        """Check every rule and checksum, and decode everything."""
        with Callbacks(progress) as callbacks:
            call(lib.xkv_entry_verify, self.entry_pointer, callbacks.progress, callbacks.user)


def open_entry(source: Union[Source, Packed], dictionary: Union[Dictionary, Source, None] = None) -> Entry:
    """Open an entry: a file, its bytes (kept, not copied), or what pack() returned.

    dictionary: the one it was packed with, opened or a file, if it needs one (info.needs_dict)."""
    data = Input(source.data if isinstance(source, Packed) else source)
    entry = Entry(Handle("xkv_entry", lib.xkv_entry_open, (data.pointer,), lib.xkv_entry_close, (data,)))
    if dictionary is not None:
        if not isinstance(dictionary, Dictionary):
            dictionary = Dictionary.open(dictionary, for_packing=False)
        entry.attach(dictionary)
    return entry


def unpack_file(entry_file: Source, engine_file: Path, *, tokens: int = 0, overwrite: bool = False,
                dictionary: Union[Dictionary, Source, None] = None, progress: Optional[Progress] = None) -> None:
    """Entry to engine file, or its first tokens (0: all). It appears when it is complete and right."""
    with open_entry(entry_file, dictionary) as entry:
        entry.restore_file(engine_file, tokens, overwrite=overwrite, progress=progress)


def _with_heads(geometry: Geometry, heads: Span) -> Tuple[Geometry, int, int]:
    """Planes of some KV heads, and which these are."""
    shared = ("latent", "K-rope")
    total = next((plane.heads for plane in geometry.planes if plane.kind not in shared), 1)
    first, count = span(heads, total, "heads")
    planes = tuple(plane if plane.kind in shared else replace(plane, heads=count) for plane in geometry.planes)
    return replace(geometry, planes=planes), first, count


def _chosen(out: Sequence[Any], wanted: Sequence[bool]) -> List[Optional[Array]]:
    if len(out) != len(wanted):
        raise ValueError(f"out: {len(out)} arrays for {len(wanted)} planes")
    for i, (array, want) in enumerate(zip(out, wanted)):
        if want and array is None:
            raise ValueError(f"out: no array for plane {i}, which was asked for")
    return [array if want else None for array, want in zip(out, wanted)]
