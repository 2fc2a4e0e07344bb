"""The storage: what LMCache asks of a native connector."""
from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, List, Optional, Sequence, Tuple

from .._page_store import PageStore
from .._serving import Config, Failures, SharedStore
from .._weights import model_fingerprint
from ..prompt import Namespace
from .objects import Objects

Completion = Tuple[int, bool, str, Optional[List[bool]]]


class XkvConnector:
    """Objects of LMCache by name, in an xkv store. submit_*() return at once; what they asked for is done by threads, and
    reported by drain_completions() once event_fd() is readable. Nothing raises for what goes wrong with an object: it is
    not stored, or a miss. `failures` counts it."""

    def __init__(self, *, layers: int, heads: int, head_dim: int, dtype: str = "bf16", mla_latent: int = 0, threads: int = 2,
                 **options: Any) -> None:
        """layers, heads, head_dim: of the KV of one rank. dtype: "f16", "bf16" or "f32". mla_latent: of MLA, the part of
        head_dim that is the latent (then heads is 1). threads: objects worked on at once. options: those of xkv. Objects
        of other sizes (of models with other state) are refused."""
        self.failures = Failures("lmcache")
        config = Config.of(options)
        self._objects = Objects(layers, heads, head_dim, dtype, mla_latent)
        self._shared = SharedStore(config)
        namespace = Namespace(model_fingerprint(config.model or ""), settings=f"lmcache {self._objects.settings}")
        self._pages = PageStore(self._shared, namespace, self._objects.planes)
        self._events = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock, self._last, self._done = threading.Lock(), 0, []  # type: ignore[var-annotated]
        self._pool = ThreadPoolExecutor(threads, "xkv.lmcache")

    def event_fd(self) -> int:
        return self._events

    def submit_batch_set(self, keys: Sequence[str], memoryviews: Sequence[Any]) -> int:
        """Store objects, which must not change before they are reported."""
        return self._submit("set", self._set, keys, memoryviews)

    def submit_batch_get(self, keys: Sequence[str], memoryviews: Sequence[Any]) -> int:
        """Restore objects into memory of their sizes; each is reported by itself."""
        return self._submit("get", self._get, keys, memoryviews)

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        return self._submit("exists", lambda key: self._pages.leading([_digest(key)]) == 1, keys)

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        return self._submit("delete", lambda key: self._pages.remove([_digest(key)])[0], keys)

    def drain_completions(self) -> List[Completion]:
        """(number that submit_*() returned, all of them done, why not, each of them)"""
        try:
            os.eventfd_read(self._events)
        except BlockingIOError:
            pass
        with self._lock:
            done: List[Completion] = self._done
            self._done = []
        return done

    def close(self) -> None:
        """Wait for what was submitted, then end."""
        self._pool.shutdown()
        with self._lock:
            events, self._events = self._events, -1
        if events >= 0:
            os.close(events)
            self._shared.close()

    def _set(self, key: str, memory: Any) -> bool:
        tokens, at = self._objects.of(memory)
        self._pages.put([_digest(key)], tokens, [0], at)
        return True

    def _get(self, key: str, memory: Any) -> bool:
        tokens, at = self._objects.of(memory)
        return self._pages.get([_digest(key)], tokens, [0], at)[0]

    def _submit(self, what: str, each: Callable[..., bool], *arguments: Sequence[Any]) -> int:
        with self._lock:
            self._last += 1
            number = self._last
        self._pool.submit(self._run, number, what, each, list(zip(*arguments)))
        return number

    def _run(self, number: int, what: str, each: Callable[..., bool], items: Sequence[Tuple[Any, ...]]) -> None:
        results, why = [], ""
        for item in items:
            try:
                results.append(each(*item))
            except Exception as error:  # nobody would hear of it, and the request would wait for ever
                self.failures.note(what, error)
                results.append(False)
                why = why or str(error)
        with self._lock:
            self._done.append((number, not why, why, results))
            os.eventfd_write(self._events, 1)


def _digest(key: str) -> bytes:
    """LMCache's names have model, rank, group, hash of the chunk and salt."""
    return hashlib.sha256(key.encode()).digest()
