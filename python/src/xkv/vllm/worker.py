"""A worker's end: restores prefixes into its blocks, and saves prompts from them."""
from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Set

import numpy as np

from .._serving import Failures, SharedStore
from ..geometry import Geometry
from ..hook import Hook
from .caches import Caches, Layout
from .identity import Identity, Prefix

_LOADS_AT_ONCE = 2
_FLUSH_SECONDS = 60.0


@dataclass(frozen=True)
class Transfer:
    """Tokens [first, end) of a prompt, which lies in these blocks from its first token on."""

    request: str
    prefix: Prefix
    blocks: List[int]
    first: int
    end: int


class Worker:
    def __init__(self, shared: SharedStore, identity: Identity, layout: Layout, failures: Failures) -> None:
        self._identity, self._layout, self.failures = identity, layout, failures
        self.hook = Hook(shared.store, **shared.pack)
        self._caches: Any = None
        self._threads = ThreadPoolExecutor(_LOADS_AT_ONCE, "xkv.vllm")
        self._loading: Dict[str, Future[None]] = {}
        self._invalid: Set[int] = set()
        self._lock = threading.Lock()

    def register(self, tensors: Dict[str, Any]) -> None:
        self._caches = Caches(self._layout, tensors)

    def close(self) -> None:
        """Finish what is on its way."""
        self._threads.shutdown()
        try:
            self.hook.flush(_FLUSH_SECONDS)
        except Exception as error:  # vLLM is going down: what is not stored by now is lost
            self.failures.note("flush", error)
        self.hook.close()

    # --- Loading ---

    def load(self, transfers: Sequence[Transfer], wait: bool) -> None:
        """Start loads on threads. Whatever happens to one, finished() has it and invalid() its blocks if it failed."""
        started = {transfer.request: self._threads.submit(self._load, transfer) for transfer in transfers}
        if not wait:
            self._loading.update(started)
            return
        for job in started.values():
            job.result()

    def finished(self) -> Set[str]:
        """Requests whose loads ended since the last call."""
        done = {request for request, job in self._loading.items() if job.done()}
        for request in done:
            del self._loading[request]
        return done

    def invalid(self) -> Set[int]:
        """Blocks whose loads failed since the last call."""
        with self._lock:
            blocks, self._invalid = self._invalid, set()
        return blocks

    def _load(self, transfer: Transfer) -> None:
        try:
            self._restore(transfer)
        except Exception as error:  # vLLM computes these tokens
            self.failures.note("load", error)
            block = self._layout.block_tokens
            with self._lock:
                self._invalid.update(transfer.blocks[transfer.first // block:-(-transfer.end // block)])

    def _restore(self, transfer: Transfer) -> None:
        block = self._layout.block_tokens
        first, blocks = transfer.first // block, transfer.blocks[:-(-transfer.end // block)]
        pages = self._caches.pages(blocks) if self._caches.on_host else self._caches.emptied(blocks)
        prompt = transfer.prefix.prompt(transfer.end)
        with self.hook.match(self._identity.own(transfer.prefix), prompt, min_tokens=transfer.end, have_tokens=transfer.first,
                             compute_tokens=0) as match:
            if not match:
                raise LookupError(f"what the scheduler found is not there any more: {match.reason}")
            match.load(self._geometry(transfer.end), pages, range(transfer.first, transfer.end))
        if not self._caches.on_host:
            self._caches.store(pages, blocks, first)

    # --- Saving ---

    def save(self, transfers: Sequence[Transfer]) -> None:
        """Copy the rows; packing and storing go on in the background."""
        for transfer in transfers:
            try:
                self._save(transfer)
            except Exception as error:  # the prompt is not stored
                self.failures.note("save", error)

    def _save(self, transfer: Transfer) -> None:
        blocks = transfer.blocks[:-(-transfer.end // self._layout.block_tokens)]
        pages = self._caches.pages(blocks) if self._caches.on_host else self._caches.fetched(blocks)
        namespace, prompt = self._identity.own(transfer.prefix), transfer.prefix.prompt()
        saved = self.hook.save(namespace, prompt, self._geometry(transfer.end), pages)
        if saved.outcome == "dropped":
            self.failures.note("save", "no room in the queue")

    def _geometry(self, tokens: int) -> Geometry:
        rope = self._identity.rope
        return Geometry(self._layout.planes(rope is not None), (rope,) if rope is not None else (),
                        np.arange(tokens, dtype=np.int32))
