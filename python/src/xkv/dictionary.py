"""Dictionaries: trained on a few caches of a model, needed to pack with profile dict and to restore that."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from ._call import Callbacks, Context, Handle, Owner, Progress, borrowed, call_with
from ._files import Input, Path, Source, to_bytes, to_file
from ._native import ffi, lib
from ._structs import fill, record
from .cache import Cache
from .geometry import Geometry
from .groups import GroupInfo, Value, check_group, groups_of, values_of
from .model import Metric, Model

if TYPE_CHECKING:
    from typing import TypedDict

    from typing_extensions import Unpack

    class TrainOptions(TypedDict, total=False):
        """How to train."""

        model: Model         # for the metadata; by default that of the first cache
        metric: Metric       # what errors cost; by default deviations of planes, keys weighing 1.4
        group_layers: int    # 4
        apart: bool          # K and V in groups of their own
        sinks: int           # tokens at the start of each cache to leave out; 4
        max_quality: float   # finest quality the components are rounded for; 85
        zstd_level: int      # 19
        cross: int           # leading coefficients of each group for the stage over all groups; 192, 0: no such stage
        writer: str

_NUMBERS = ("group_layers", "apart", "sinks", "max_quality", "zstd_level", "cross")


@dataclass(frozen=True)
class DictionaryInfo:
    """What a dictionary is."""

    id: bytes              # content id, 16 bytes
    file_size: int
    layer_count: int
    group_count: int       # the last one is the cross stage, if there is one
    component_count: int   # of the groups that hold planes
    unit: float            # root mean square deviation of a coefficient: the unit of quality
    tokens: int            # training rows
    max_quality: float
    fingerprint: bytes     # of the model, 16 bytes; zero when unknown
    cross_components: int


class Dictionary(Owner):
    """An opened dictionary (.xkvd). May be shared by threads."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    @classmethod
    def open(cls, source: Source, *, for_packing: bool = True) -> Dictionary:
        """A file or its bytes. for_packing=False leaves out what only packing needs: half of the memory, and faster."""
        data = Input(source)
        return cls(Handle("xkv_dict", lib.xkv_dict_open, (data.pointer, for_packing), lib.xkv_dict_close))

    @staticmethod
    def read_info(source: Source) -> DictionaryInfo:
        """What it is, without decoding it."""
        data, info = Input(source), ffi.new("xkv_dict_info *")
        with borrowed() as context:
            call_with(context, lib.xkv_dict_read_info, data.pointer, info)
        return record(DictionaryInfo, info)

    def __enter__(self) -> Dictionary:
        return self

    def __repr__(self) -> str:
        info = self.info
        return f"<xkv.Dictionary {info.id.hex()}, {info.layer_count} layers, {info.tokens} training tokens>"

    @property
    def pointer(self) -> Any:
        """xkv_dict *"""
        return self._handle.pointer

    @property
    def info(self) -> DictionaryInfo:
        info = ffi.new("xkv_dict_info *")
        lib.xkv_dict_get_info(self.pointer, info)
        return record(DictionaryInfo, info)

    @property
    def geometry(self) -> Geometry:
        """Its planes, without tokens."""
        return Geometry.from_c(lib.xkv_dict_geometry(self.pointer))

    @property
    def groups(self) -> List[GroupInfo]:
        """Of codec dict; the last one may be the cross stage."""
        return groups_of(lib.xkv_dict_get_group, self.pointer, self.info.group_count)

    @property
    def values(self) -> Dict[str, Value]:
        """The metadata: model, writer, settings."""
        return values_of(lib.xkv_dict_get_value, self.pointer, lib.xkv_dict_value_count(self.pointer))

    def leading(self, group: int) -> int:
        """How many leading coefficients of a group the cross stage codes in its stead; 0 without one."""
        check_group(group, self.info.group_count)
        return int(lib.xkv_dict_leading(self.pointer, group))

    def sigma(self, group: int) -> npt.NDArray[np.float32]:
        """Standard deviations of a group's coefficients in training, by falling size."""
        check_group(group, self.info.group_count)
        count = ffi.new("uint32_t *")
        values = lib.xkv_dict_sigma(self.pointer, group, count)
        return np.frombuffer(ffi.buffer(values, 4 * count[0]), np.float32).copy()

    def step(self, quality: float) -> float:
        """The quantizer's step of a quality: 2/3 * unit * 2^((50 - quality) / 16)."""
        return float(lib.xkv_dict_step(self.pointer, quality))

    def quality(self, step: float) -> float:
        """The inverse."""
        return float(lib.xkv_dict_quality(self.pointer, step))


def _options(options: Any, caches: Sequence[Cache], callbacks: Callbacks) -> Tuple[Any, List[object]]:
    o = ffi.new("xkv_train_options *", lib.xkv_train_options_default())
    rest, keep = dict(options), [callbacks]
    metric, writer = rest.pop("metric", None), rest.pop("writer", None)
    model: Optional[Model] = rest.pop("model", None) or (caches[0].model if caches else None)
    if metric is not None:
        o.metric = metric.pointer
    if model is not None:
        o.model = model.pointer
    if writer is not None:
        keep.append(ffi.new("char[]", writer.encode()))
        o.writer = keep[-1]
    fill(o, {name: value for name, value in rest.items() if value is not None}, _NUMBERS)
    o.progress, o.progress_user = callbacks.progress, callbacks.user
    return o, [*keep, metric, model]


def train(caches: Sequence[Cache], *, progress: Optional[Progress] = None, **options: Unpack[TrainOptions]) -> bytes:
    """Train a dictionary on caches of one model, opened with the model. A few thousand tokens are enough.

    >>> dictionary = Dictionary.open(train([Cache.open(path, model) for path in paths]))
    """
    with borrowed() as context, Callbacks(progress) as callbacks:
        return to_bytes(_writer(caches, options, callbacks), context)


def train_file(caches: Sequence[Cache], dictionary_file: Path, *, overwrite: bool = False,
               progress: Optional[Progress] = None, **options: Unpack[TrainOptions]) -> None:
    """The same into a file, which appears when it is complete. FileExistsError unless `overwrite`."""
    with borrowed() as context, Callbacks(progress) as callbacks:
        to_file(_writer(caches, options, callbacks), context, dictionary_file, overwrite)


def _writer(caches: Sequence[Cache], options: Any, callbacks: Callbacks) -> Any:
    o, keep = _options(options, caches, callbacks)
    pointers = ffi.new("xkv_cache *[]", [cache.pointer for cache in caches])

    def write(context: Context, output: Any) -> None:
        assert keep is not None
        call_with(context, lib.xkv_train, pointers, len(caches), o, output)
    return write
