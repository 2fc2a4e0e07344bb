"""What the adapters of serving engines share: their configuration, one opened store for a process, RoPE by a model's
configuration, failures that become misses, and pages that an engine names by hashes."""
from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import math
import os
import threading
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Tuple, TypeVar, cast

from ._call import Callbacks, logger
from .dictionary import Dictionary
from .errors import FormatError, MissingFileError
from .geometry import Plane, Rope
from .packing import pack_options
from .store import Store

F = TypeVar("F", bound=Callable[..., Any])


# --- Configuration ---

@dataclass(frozen=True)
class Config:
    """What all adapters are told, as the engine's configuration holds it."""

    store: str                        # folder; it is made when it does not exist
    cap: int = 0                      # of a store that is made: bytes, 0: none
    dictionary: Optional[str] = None  # file to pack with
    pack: Mapping[str, Any] = field(default_factory=dict)  # as for xkv.pack(); lossless unless given
    model: Optional[str] = None       # folder or name that stands for the weights; by default the engine's
    rope: Optional[Mapping[str, Any]] = None  # fields of config.json; by default the engine's, where it tells

    @classmethod
    def of(cls, values: Mapping[str, Any], ignored: Tuple[str, ...] = ()) -> Config:
        """ValueError: a name that is not known, or no store."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known - set(ignored))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not an option of xkv; known are {', '.join(sorted(known))}")
        if not values.get("store"):
            raise ValueError("store: the folder of the store is missing")
        return cls(**{name: value for name, value in values.items() if name in known})


def rope_of_config(config: Mapping[str, Any], head_dim: int) -> Optional[Rope]:
    """The rotary embedding by fields of a model's config.json: default, linear and llama3. None: not known, one that
    changes with the length, or more than one; then keys are coded as they are."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    share = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if not isinstance(theta, (int, float)) or kind not in _SCALINGS or config.get("rope_local_base_freq"):
        return None
    pairs = int(head_dim * share) // 2
    plain = [float(theta) ** (-i / pairs) for i in range(pairs)]
    return Rope(tuple(_SCALINGS[kind](frequency, scaling) for frequency in plain))


def rope_of_model(told: Optional[Mapping[str, Any]], name: str, plane: Plane) -> Optional[Rope]:
    """Of the keys in a plane: as `told`, else by the config.json of a model in a folder."""
    if plane.kind != "K":
        return None
    file = os.path.join(name, "config.json")
    if told is None and os.path.isfile(file):
        with open(file, encoding="utf-8") as opened:
            config = json.load(opened)
        told = config.get("text_config", config)
    return rope_of_config(told or {}, plane.head_dim)


def _llama3(frequency: float, scaling: Mapping[str, Any]) -> float:
    """Long waves are slowed down by the factor, short ones kept, those between them blended."""
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return float(kept * frequency + (1 - kept) * frequency / scaling["factor"])


_SCALINGS: Dict[str, Callable[[float, Mapping[str, Any]], float]] = {
    "default": lambda frequency, _: frequency,
    "linear": lambda frequency, scaling: float(frequency / scaling["factor"]),
    "llama3": _llama3,
}


# --- Failures ---

class Failures:
    """What went wrong, counted by kind; each kind is logged once. None of it reaches the engine: it is a miss."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def note(self, what: str, error: object) -> None:
        kind = f"{what}: {type(error).__name__ if isinstance(error, Exception) else error}"
        with self._lock:
            self.counts[kind] += 1
            first = self.counts[kind] == 1
        if first:
            logger.warning("xkv.%s: %s failed, which counts as a miss, and is not logged again: %s", self.engine, what, error)


def missing(fallback: Callable[..., Any]) -> Callable[[F], F]:
    """A method of an object with `failures` that never raises: instead it returns fallback(its first argument)."""
    def wrap(method: F) -> F:
        @functools.wraps(method)
        def guarded(self: Any, *arguments: Any, **named: Any) -> Any:
            try:
                return method(self, *arguments, **named)
            except Exception as error:  # whatever it is: an engine's scheduler must not stop for a cache
                self.failures.note(method.__name__, error)
                return fallback(arguments[0] if arguments else next(iter(named.values()), None))
        return cast(F, guarded)
    return wrap


# --- The store ---

class _Opened:
    def __init__(self, store: Store) -> None:
        self.store, self.users = store, 0


_opened: Dict[Tuple[int, str], _Opened] = {}  # by process, since a store is not used across fork()
_opening = threading.Lock()


class SharedStore:
    """A store for one user of several in this process, which opens its folder once; and the dictionary to pack with."""

    def __init__(self, config: Config) -> None:
        """Opens or makes the store. Errors: those of Store.open() and Dictionary.open(); options that are wrong."""
        self.pack: Dict[str, Any] = dict(config.pack)
        pack_options(dict(self.pack), Callbacks(), None)  # names that are wrong are told now
        if not self.pack and config.dictionary is None:
            self.pack["profile"] = "lossless"
        self._key = os.getpid(), os.path.realpath(config.store)
        with _opening:
            opened = _opened.get(self._key)
            if opened is None or opened.store.closed:
                opened = _opened[self._key] = _Opened(_open_or_make(config))
            opened.users += 1
        self.store = opened.store
        try:
            if config.dictionary is not None:
                self.store.put_dictionary(config.dictionary)
                self.pack["dictionary"] = Dictionary.open(config.dictionary)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The last one to close it closes the store."""
        with _opening:
            opened = _opened.get(self._key)
            if opened is None or opened.store is not self.store:
                return
            opened.users -= 1
            if opened.users == 0:
                del _opened[self._key]
                opened.store.close()


def _open_or_make(config: Config) -> Store:
    with _one_at_a_time(os.path.dirname(os.path.realpath(config.store))):
        try:
            return Store.open(config.store)
        except (MissingFileError, FormatError):  # there is none, or an empty folder; else init() says what is there
            return Store.init(config.store, cap=config.cap)


@contextlib.contextmanager
def _one_at_a_time(folder: str) -> Iterator[None]:
    """Among processes: the ranks of an engine start together, and one would see what another has half made."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
