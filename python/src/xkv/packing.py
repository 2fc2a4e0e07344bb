"""Packing: caches to entries."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Union

from ._call import Callbacks, Context, Progress, borrowed, call, call_with
from ._files import Path, encoded, to_bytes
from ._native import ffi, lib
from ._structs import fill, record
from .cache import Cache, Planes
from .dictionary import Dictionary
from .geometry import KINDS, index_of
from .model import Model

if TYPE_CHECKING:
    from typing import TypedDict

    from typing_extensions import Unpack

    class PackSettings(TypedDict, total=False):
        """How to pack, and what it may cost: at most one of ranks, ratio, error, energy, quality."""

        profile: str          # "auto" (default), "lossless", "svd", "dict", "scalar"
        ratio: float          # > 1: raw 16-bit bytes / all bytes of the entry
        error: float          # 0 .. 1: relative, of all coded planes together, kept by measurement
        quality: float        # dict: 1 .. 100, each 16 points halve the step
        energy: float         # svd: share of each group's sum of squares to keep
        rank_k: int           # svd: components of a full group's K ...
        rank_v: int           # ... and V
        group_layers: int     # layers per group; 4
        sinks: int            # exact tokens at the start; 4
        window: int           # exact tokens at the end; 0
        iterations: int       # svd: power iterations; 2
        zstd_level: int       # 1 .. 19; 4
        zstd_factors: bool
        half_factors: bool    # svd: factors at 16 bits, as published
        chunk_tokens: int     # 256
        writer: str           # program name and version for the metadata

    class PackOptions(PackSettings, total=False):
        """The same, and whose cache it is."""

        dictionary: Dictionary  # opened for packing
        model: Model            # for the metadata; by default the cache's

PROFILES = ("auto", "lossless", "svd", "dict", "scalar")
_NUMBERS = ("ratio", "error", "quality", "energy", "rank_k", "rank_v", "group_layers", "sinks", "window", "iterations",
            "zstd_level", "zstd_factors", "half_factors", "chunk_tokens")


@dataclass(frozen=True)
class ProfileEstimate:
    """What a profile that auto considered would come to."""

    bytes: float
    error: float


@dataclass(frozen=True)
class PackReport:
    """What packing did."""

    raw_bytes: int                # of the cache's tensors as the engine holds them
    raw16_bytes: int              # the same at 16 bits an element
    entry_bytes: int              # the whole entry
    ratio: float                  # raw16_bytes / entry_bytes
    errors: Dict[str, float]      # by kind of plane: relative error over all of them
    group_count: int
    lossless_groups: int
    fallback_groups: int          # of those, because loss would not have paid
    nonfinite_planes: int         # planes holding NaN or Inf
    step: float                   # the quantizer's; 0: none
    error_metric: float           # relative error as `error` is meant
    components: int               # that were coded
    component_total: int
    profile: str                  # that was used: not "auto"
    estimates: Dict[str, ProfileEstimate]  # why auto used it

    @classmethod
    def from_c(cls, r: Any) -> PackReport:
        errors = {kind: r.error[i] for i, kind in enumerate(KINDS) if r.error[i]}
        estimates = {name: ProfileEstimate(r.estimates[i].bytes, r.estimates[i].error)
                     for i, name in enumerate(PROFILES) if r.estimates[i].bytes}
        return record(cls, r, errors=errors, profile=PROFILES[r.profile], estimates=estimates)


@dataclass(frozen=True)
class Packed:
    """An entry in memory and how it was made."""

    data: bytes
    report: PackReport

    def __len__(self) -> int:
        return len(self.data)

    def __bytes__(self) -> bytes:
        return self.data


def pack_options(options: Dict[str, Any], callbacks: Callbacks, model: Optional[Model]) -> Tuple[Any, List[object]]:
    """xkv_pack_options *, and what must live as long as it is used, itself included."""
    o = ffi.new("xkv_pack_options *", lib.xkv_pack_options_default())
    keep: List[object] = [o]
    rest = dict(options)
    o.profile = index_of(PROFILES, rest.pop("profile", "auto"), "profile")
    dictionary = rest.pop("dictionary", None)
    if dictionary is not None:
        o.dict = dictionary.pointer
        keep.append(dictionary)
    model = rest.pop("model", None) or model
    if model is not None:
        o.model = model.pointer
        keep.append(model)
    writer = rest.pop("writer", None)
    if writer is not None:
        keep.append(ffi.new("char[]", writer.encode()))
        o.writer = keep[-1]
    fill(o, {name: value for name, value in rest.items() if value is not None}, _NUMBERS)
    o.progress, o.progress_user = callbacks.progress, callbacks.user
    keep.append(callbacks)
    return o, keep


def pack(source: Union[Cache, Planes], *, progress: Optional[Progress] = None, **options: Unpack[PackOptions]) -> Packed:
    """Pack a cache or planes in memory. progress(done, total): bytes of raw cache; an exception in it stops the call.

    >>> packed = pack(Cache.open("chat.ggsq", model), ratio=8)
    """
    report = ffi.new("xkv_pack_report *")
    with borrowed() as context, Callbacks(progress) as callbacks:
        o, keep = pack_options(dict(options), callbacks, source.model if isinstance(source, Cache) else None)

        def write(context: Context, output: Any) -> None:
            if isinstance(source, Cache):
                call_with(context, lib.xkv_pack_cache, source.pointer, o, output, report)
            else:
                geometry, kept = source.geometry.to_c()
                call_with(context, lib.xkv_pack, geometry, source.views.pointer, ffi.NULL, ffi.NULL, 0, o, output, report)
                del kept
        data = to_bytes(write, context)
        del keep
    return Packed(data, PackReport.from_c(report))


def pack_file(engine_file: Path, entry_file: Path, *, overwrite: bool = False, progress: Optional[Progress] = None,
              **options: Unpack[PackOptions]) -> PackReport:
    """Engine file to entry file, which appears when it is complete. FileExistsError unless `overwrite`."""
    report = ffi.new("xkv_pack_report *")
    with Callbacks(progress) as callbacks:
        o, keep = pack_options(dict(options), callbacks, None)
        call(lib.xkv_pack_file, encoded(engine_file), encoded(entry_file), overwrite, o, report)
        del keep
    return PackReport.from_c(report)
