"""What a cache is: planes, rotary embeddings, positions, tokens."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import numpy.typing as npt

from ._native import ffi, lib

DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")  # by xkv_dtype; the last two are blocks of ggml, in engine files only
KINDS = ("K", "V", "latent", "K-rope")  # by xkv_plane_kind
STYLES = ("interleaved", "half-split")  # by xkv_rope_style
# Of arrays. bf16 has no numpy type: its bits travel as uint16.
NUMPY_TYPES: Dict[str, "np.dtype[Any]"] = {
    "f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}

Tokens = Union[Sequence[int], npt.NDArray[np.integer[Any]]]


def int32_array(values: Any, what: str) -> npt.NDArray[np.int32]:
    """A contiguous copy; values beyond int32 are a ValueError, not other numbers."""
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{what}: {array.ndim}-dimensional {array.dtype}, expected a row of integers")
    if int(array.max()) > 0x7FFFFFFF or int(array.min()) < -0x80000000:
        raise ValueError(f"{what}: not all of them fit 32 bits")
    return np.array(array, np.int32, order="C")


@dataclass(frozen=True)
class Rope:
    """A rotary embedding, resolved: pair i at position p is rotated by p * inv_freq[i] and multiplied by `scale`."""

    inv_freq: Tuple[float, ...]       # radians per position, one for each of the n_rot/2 pairs
    style: str = "half-split"         # pairs (i, i + n_rot/2); "interleaved": (2i, 2i+1)
    offset: int = 0                   # first rotated dim of a head
    scale: float = 1.0                # YaRN's attention factor

    @property
    def n_rot(self) -> int:
        """Rotated dims per head."""
        return 2 * len(self.inv_freq)

    @classmethod
    def of(cls, base: float, n_rot: int, style: str = "half-split") -> Rope:
        """The plain one: inv_freq[i] = base^(-2i/n_rot)."""
        return cls(tuple(float(base) ** (-2.0 * i / n_rot) for i in range(n_rot // 2)), style)

    @classmethod
    def from_c(cls, rope: Any) -> Rope:
        frequencies = tuple(rope.inv_freq[i] for i in range(rope.n_rot // 2))
        return cls(frequencies, STYLES[rope.style], rope.offset, rope.scale)

    def to_c(self, rope: Any) -> None:
        pairs = len(self.inv_freq)
        if not 1 <= pairs <= lib.XKV_MAX_ROPE_PAIRS:
            raise ValueError(f"inv_freq: {pairs} pairs, expected 1 to {lib.XKV_MAX_ROPE_PAIRS}")
        rope.n_rot, rope.offset, rope.scale = self.n_rot, self.offset, self.scale
        rope.style = index_of(STYLES, self.style, "style")
        rope.inv_freq[0:pairs] = [float(f) for f in self.inv_freq]


def index_of(names: Sequence[str], name: str, what: str) -> int:
    if name not in names:
        raise ValueError(f"{what}: {name!r}, expected one of {', '.join(names)}")
    return names.index(name)


def name_of(names: Sequence[str], index: int) -> str:
    """What a newer library knows is a number."""
    return names[index] if index < len(names) else str(index)


@dataclass(frozen=True)
class Plane:
    """One per-token row stream of one layer: `heads` * `head_dim` elements a token."""

    layer: int
    kind: str                   # "K", "V", "latent", "K-rope"
    heads: int                  # KV heads
    head_dim: int
    dtype: str = "f16"          # "f32", "f16", "bf16"; in engine files also "q8_0", "q4_0"
    rope: Optional[int] = None  # index into Geometry.ropes; None: not rotated, or unknown how


@dataclass(frozen=True, eq=False)
class Geometry:
    """Planes in order of layer, then kind; positions [tokens]; token_ids, perhaps none."""

    planes: Tuple[Plane, ...]
    ropes: Tuple[Rope, ...]
    positions: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def tokens(self) -> int:
        """Rows of every plane."""
        return len(self.positions)

    @property
    def layers(self) -> int:
        return 1 + max((plane.layer for plane in self.planes), default=-1)

    def index(self, layer: int, kind: str) -> int:
        """Where the plane is in `planes`. LookupError: there is none."""
        for i, plane in enumerate(self.planes):
            if (plane.layer, plane.kind) == (layer, kind):
                return i
        raise LookupError(f"no plane {kind} of layer {layer}")

    @classmethod
    def from_c(cls, g: Any) -> Geometry:
        planes = []
        for i in range(g.plane_count):
            p = g.planes[i]
            rope = None if p.rope == lib.XKV_NO_ROPE else p.rope
            planes.append(Plane(p.layer, name_of(KINDS, p.kind), p.heads, p.head_dim, name_of(DTYPES, p.dtype), rope))
        return cls(tuple(planes), tuple(Rope.from_c(g.ropes[i]) for i in range(g.rope_count)),
                   _copied(g.positions, g.token_count), _copied(g.token_ids, g.token_id_count))

    def to_c(self) -> Tuple[Any, List[object]]:
        """The struct, and what must live as long as it."""
        planes = ffi.new("xkv_plane[]", max(len(self.planes), 1))
        for p, plane in zip(planes, self.planes):
            p.layer, p.heads, p.head_dim = plane.layer, plane.heads, plane.head_dim
            p.kind, p.dtype = index_of(KINDS, plane.kind, "kind"), index_of(DTYPES, plane.dtype, "dtype")
            p.rope = lib.XKV_NO_ROPE if plane.rope is None else plane.rope
        ropes = ffi.new("xkv_rope[]", max(len(self.ropes), 1))
        for i, rope in enumerate(self.ropes):
            rope.to_c(ropes[i])
        positions, ids = int32_array(self.positions, "positions"), int32_array(self.token_ids, "token_ids")
        g = ffi.new("xkv_geometry *")
        g.layer_count, g.plane_count, g.rope_count = self.layers, len(self.planes), len(self.ropes)
        g.token_count, g.token_id_count = len(positions), len(ids)
        g.planes, g.ropes = planes, ropes
        g.positions, g.token_ids = pointer_to(positions), pointer_to(ids)
        return g, [planes, ropes, positions, ids]


def pointer_to(array: npt.NDArray[np.int32]) -> Any:
    """int32_t * to the elements of a contiguous array, which must be kept."""
    return ffi.cast("int32_t *", array.ctypes.data)


def _copied(pointer: Any, count: int) -> npt.NDArray[np.int32]:
    if count == 0:
        return np.empty(0, np.int32)
    return np.frombuffer(ffi.buffer(pointer, 4 * count), np.int32).copy()
