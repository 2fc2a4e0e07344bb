"""Pages of serving engines that know them by names, not by tokens."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ._serving import SharedStore
from .cache import Planes
from .geometry import Geometry, Plane, Rope
from .prompt import Media, Namespace, PageKey, Prompt

Arrays = Sequence[Any]  # arrays of all planes, or Pages
At = Callable[[Sequence[int]], Arrays]  # where a sequence lies whose pages are at these places of the engine's memory


class Place(NamedTuple):
    """Where a page is stored."""

    id: int      # of the entry
    tokens: int  # of the entry, up to the end of the page


class PageStore:
    """Pages named by 32 bytes each, which stand for the page and all before it. Pages that are put together become one
    entry and are coded together; each is found alone. For any number of threads."""

    def __init__(self, shared: SharedStore, namespace: Namespace, planes: Sequence[Plane], rope: Optional[Rope] = None) -> None:
        """planes: of a page. rope: of all K; used for pages whose positions are known."""
        self.store, self.namespace, self.pack = shared.store, namespace, shared.pack
        self._unrotated = tuple(replace(p, rope=None) for p in planes)
        self._rotated = tuple(replace(p, rope=0 if rope is not None and p.kind in ("K", "K-rope") else None) for p in planes)
        self._rope = rope

    def places(self, keys: Sequence[bytes]) -> List[Optional[Place]]:
        """Where each of the pages is stored."""
        found = [self.store.peek_keys(self.namespace, [key]) for key in keys]
        return [Place(match.id, match.tokens) if match.reason == "found" else None for match in found]

    def leading(self, keys: Sequence[bytes]) -> int:
        """How many of the first pages are stored."""
        for i, key in enumerate(keys):
            if self.store.peek_keys(self.namespace, [key]).reason != "found":
                return i
        return len(keys)

    def put(self, keys: Sequence[bytes], page_tokens: int, table: Sequence[int], at: At, first: Optional[int] = None) -> None:
        """Store those pages that are not stored: page i, named keys[i], lies at table[i]. first: position of the first
        token of the first page; None: not known."""
        stored = self.places(keys)
        for begin, end in _runs([place is None for place in stored]):
            start = None if first is None else first + begin * page_tokens
            self._put_run(keys[begin:end], page_tokens, at(table[begin:end]), start)

    def _put_run(self, keys: Sequence[bytes], page_tokens: int, arrays: Arrays, first: Optional[int]) -> None:
        count = len(keys) * page_tokens
        positions = np.arange(first or 0, (first or 0) + count, dtype=np.int32)
        known = first is not None and self._rope is not None
        geometry = Geometry(self._rotated, (self._rope,), positions) if known and self._rope is not None else Geometry(
            self._unrotated, (), positions)
        # There are no tokens to store: what is before each page tells it from others.
        prompt = Prompt(np.zeros(count, np.int32), [Media(i * page_tokens, key) for i, key in enumerate(keys)])
        names = [PageKey(key, (i + 1) * page_tokens) for i, key in enumerate(keys)]
        options = dict(self.pack)
        if first:
            options.setdefault("sinks", 0)  # the first tokens of a prompt are elsewhere
        self.store.put_reachable(self.namespace, Planes(geometry, arrays), prompt, keys=names, **options)

    def get(self, keys: Sequence[bytes], page_tokens: int, table: Sequence[int], at: At) -> List[bool]:
        """Restore pages to where table[i] says. True: the page is in place; what is not may hold anything."""
        stored, done = self.places(keys), [False] * len(keys)
        for begin, end in _together(stored, page_tokens):
            place = stored[end - 1]
            assert place is not None
            done[begin:end] = [self._get_run(keys[end - 1], place, page_tokens, table[begin:end], at)] * (end - begin)
        return done

    def _get_run(self, last: bytes, place: Place, page_tokens: int, table: Sequence[int], at: At) -> bool:
        with self.store.match_keys(self.namespace, [last]) as match:
            if not match or (match.id, match.tokens) != place:
                return False  # evicted meanwhile
            first = place.tokens - len(table) * page_tokens
            before = [0] * (first // page_tokens)  # pages of the entry that nobody asked for
            match.read(tokens=range(first, place.tokens), out=at([*before, *table]))
            return True

    def remove(self, keys: Sequence[bytes]) -> List[bool]:
        """Remove the entries of pages, with all other pages in them. True: there was one."""
        stored = self.places(keys)
        for id in {place.id for place in stored if place is not None}:
            self.store.rm(self.namespace, id)
        return [place is not None for place in stored]


def _runs(flags: Sequence[bool]) -> List[Tuple[int, int]]:
    """[begin, end) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], np.asarray(flags, bool), [False]))))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def _together(stored: Sequence[Optional[Place]], page_tokens: int) -> List[Tuple[int, int]]:
    """[begin, end) of stored pages that follow each other in one entry."""
    out: List[Tuple[int, int]] = []
    for i, place in enumerate(stored):
        if place is None:
            continue
        before = stored[i - 1] if i else None
        if before is not None and (before.id, before.tokens + page_tokens) == place:
            out[-1] = out[-1][0], i + 1
        else:
            out.append((i, i + 1))
    return out
