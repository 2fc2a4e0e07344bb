"""The serde "xkv": packs what LMCache keeps in any storage of its second level.

    {"type": "fs", "base_path": "/cache", "serde": {"type": "xkv", "pack": {"error": 0.1}}}

LMCache knows the serdes that are registered when its server starts: start it by `python -m xkv.lmcache server ...`, which
is `lmcache server ...` with this one."""
from __future__ import annotations

import struct
from typing import Any, Dict, Mapping, Optional

import numpy as np
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, Serializer, register_serde_factory

from .._call import Callbacks
from ..cache import Planes
from ..dictionary import Dictionary
from ..entry import open_entry
from ..geometry import NUMPY_TYPES, Geometry
from ..packing import pack, pack_options
from .objects import Objects

_LENGTH = struct.Struct("<Q")  # of the entry behind it: buffers are longer
_SLACK = 1 << 16               # what an entry of rows that do not shrink takes beside them, and 1/64 of them


class _Packing:
    """How objects are packed; for both directions."""

    def __init__(self, pack: Optional[Mapping[str, Any]] = None, dictionary: Optional[str] = None, heads: int = 1,
                 mla_latent: int = 0) -> None:
        """pack: as for xkv.pack(), lossless unless given. dictionary: file to pack with. heads: KV heads of a rank, which
        dictionaries depend on. mla_latent: of MLA, the part of a row that is the latent."""
        self.options: Dict[str, Any] = dict(pack or {})
        pack_options(dict(self.options), Callbacks(), None)  # names that are wrong are told now
        self.dictionary = Dictionary.open(dictionary) if dictionary is not None else None
        if self.dictionary is not None:
            self.options["dictionary"] = self.dictionary
        elif not self.options:
            self.options["profile"] = "lossless"
        self.heads, self.mla_latent = heads, mla_latent

    def planes(self, memory: Any) -> Planes:
        """Of an object with the KV of a chunk: KV_2LTD, or KV_MLA_FMT."""
        shape, dtype = memory.tensor.shape, _dtype(memory.tensor)
        if len(shape) != 4 or shape[0] != (1 if self.mla_latent else 2) or shape[3] % self.heads:
            raise ValueError(f"an object of shape {tuple(shape)} is not [2, layers, tokens, width]; for MLA give mla_latent")
        objects = Objects(shape[1], self.heads, shape[3] // self.heads, dtype, self.mla_latent)
        tokens, at = objects.of(memory.byte_array)
        return Planes(Geometry(tuple(objects.planes), (), np.arange(tokens, dtype=np.int32)), at([0]))


class XkvSerializer(Serializer):  # type: ignore[misc]
    def __init__(self, packing: _Packing) -> None:
        self._packing = packing

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        """Pack src into dst; the bytes that were written. ValueError: src is no KV of a chunk, or dst too small."""
        entry = pack(self._packing.planes(src), **self._packing.options).data
        target = np.frombuffer(dst.byte_array, np.uint8)
        size = _LENGTH.size + len(entry)
        if size > target.size:
            raise ValueError(f"{size} bytes do not fit {target.size}")
        target[:_LENGTH.size] = np.frombuffer(_LENGTH.pack(len(entry)), np.uint8)
        target[_LENGTH.size:size] = np.frombuffer(entry, np.uint8)
        return size

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """The most that it can be; what was written is what LMCache stores."""
        raw = sum(int(np.prod(shape)) * int(dtype.itemsize) for shape, dtype in zip(layout_desc.shapes, layout_desc.dtypes))
        return raw + raw // 64 + _SLACK


class XkvDeserializer(Deserializer):  # type: ignore[misc]
    def __init__(self, packing: _Packing) -> None:
        self._packing = packing

    def deserialize(self, src: Any, dst: Any, key: Any) -> None:
        """Restore src into dst. ValueError and XkvError: src is damaged, or of another shape; LMCache computes it again."""
        source = np.frombuffer(src.byte_array, np.uint8)
        (size,) = _LENGTH.unpack(source[:_LENGTH.size].tobytes()) if source.size >= _LENGTH.size else (0,)
        if not 0 < size <= source.size - _LENGTH.size:
            raise ValueError(f"{size} bytes in a buffer of {source.size}")
        planes = self._packing.planes(dst)
        with open_entry(source[_LENGTH.size:_LENGTH.size + size].tobytes(), self._packing.dictionary) as entry:
            stored, wanted = entry.geometry, planes.geometry
            if (stored.planes, stored.tokens) != (wanted.planes, wanted.tokens):
                raise ValueError(f"{stored.tokens} tokens in {len(stored.planes)} planes, expected {wanted.tokens} in "
                                 f"{len(wanted.planes)}, or planes of other sizes")
            entry.read(out=planes.arrays)


def _dtype(tensor: Any) -> str:
    """ValueError: of elements that cannot be packed, such as fp8."""
    name = str(tensor.dtype).rpartition(".")[2]
    known = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    if name not in known:
        raise ValueError(f"a cache of {name} is not supported; known are {', '.join(NUMPY_TYPES)}")
    return known[name]


def create(kwargs: Mapping[str, Any]) -> Any:
    """What LMCache calls with the options of the serde; max_workers: objects packed at once."""
    options = dict(kwargs)
    workers = int(options.pop("max_workers", 1))
    packing = _Packing(**options)
    return AsyncSerdeProcessor(XkvSerializer(packing), XkvDeserializer(packing), max_workers=workers)


register_serde_factory("xkv", create)
