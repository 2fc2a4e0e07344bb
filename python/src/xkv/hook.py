"""An engine's end of a store: match before prefill, load layer by layer, save in the background."""
from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence, Union

from ._arrays import Views
from ._call import Callbacks, Handle, Owner, _Settings, borrowed, call, call_with, context_options
from ._files import Span, span
from ._native import ffi, lib
from ._structs import record
from .cache import Planes
from .geometry import Geometry, Tokens, int32_array, pointer_to
from .packing import pack_options
from .pages import Pages, PageViews
from .prompt import Namespace, PageKey, PromptLike, page_keys, prompt_of
from .store import Store
from .store_types import MATCH_REASONS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .packing import PackOptions

FOREVER = 0xFFFFFFFF
OUTCOMES = ("queued", "stored", "pending", "dropped")


@dataclass(frozen=True)
class Saved:
    """What save() did."""

    outcome: str  # "queued", "stored" (it was there), "pending" (it is on its way), "dropped" (no room)
    ticket: int   # of the save that is on its way; 0: none


@dataclass(frozen=True)
class HookCounters:
    """Since the hook was created; see xkv_hook_counters in <xkv/hook.h>."""

    matches_found: int
    matches_declined: int
    misses_none: int
    misses_short: int
    misses_expired: int
    misses_no_dictionary: int
    misses_corrupt: int
    misses_gone: int
    misses_newer: int
    misses_whole_only: int
    matches_failed: int
    found_tokens: int
    match_seconds: float
    loads_ok: int
    loads_damaged: int
    loads_cancelled: int
    loads_refused: int
    loads_failed: int
    loaded_tokens: int
    loaded_bytes: int
    loaded_packed_bytes: int
    load_seconds: float
    saves_queued: int
    saves_known: int
    saves_pending: int
    saves_dropped: int
    saves_refused: int
    copy_seconds: float
    saves_stored: int
    saves_existed: int
    saves_failed: int
    saves_cancelled: int
    saved_tokens: int
    saved_bytes: int
    saved_packed_bytes: int
    pack_seconds: float
    queue_saves: int
    queue_bytes: int
    queue_bytes_peak: int
    seconds_per_load: float
    seconds_per_byte: float
    seconds_per_token: float


class HookMatch:
    """What a match found: true when tokens can be loaded, and then safe from eviction until close()."""

    def __init__(self, found: Any, handle: Optional[Handle]) -> None:
        self._handle = handle
        self.reason = MATCH_REASONS.get(found.reason, str(found.reason))
        self.tokens = int(found.tokens)                  # leading tokens that can be reused: whole pages
        self.offered_tokens = int(found.offered_tokens)  # the same, also when it was declined
        self.entry_tokens = int(found.entry_tokens)
        self.id = int(found.id)
        self.bytes = int(found.bytes)
        self.load_seconds = float(found.load_seconds)            # expected
        self.recompute_seconds = float(found.recompute_seconds)  # 0: not known

    def __bool__(self) -> bool:
        return self._handle is not None and not self._handle.closed

    def __enter__(self) -> HookMatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<xkv.HookMatch {self.reason}, {self.tokens} tokens>"

    def close(self) -> None:
        """The entry may be evicted again. Not while a load runs."""
        if self._handle is not None:
            self._handle.close()

    def load(self, geometry: Geometry, arrays: Sequence[Any], tokens: Span = None, *, rows: Optional[Any] = None,
             positions: Optional[Tokens] = None, on_group: Optional[Callable[[int, int], object]] = None) -> None:
        """Restore tokens (None: all that can be reused) into arrays[i] of plane i: [tokens, heads, head_dim]; or into Pages.

        geometry: the engine's, whose layers and RoPE must be those of the entry. rows: [tokens] where to put them in each
        array. positions: [tokens] that K is rotated for. on_group(group, layers): layers 0 .. layers-1 are complete now.

        On an exception what on_group announced is right, the rest undefined: the engine computes the tokens."""
        if self._handle is None:
            raise ValueError(f"nothing was found: {self.reason}")
        first, count = span(tokens, self.tokens, "tokens")
        paged = arrays and all(isinstance(pages, Pages) for pages in arrays)
        views: Union[Views, PageViews] = (PageViews(geometry, arrays, first, count, writable=True) if paged
                                          else Views(geometry, arrays, count, rows, writable=True))
        g, kept = geometry.to_c()
        o = ffi.new("xkv_hook_load_options *", lib.xkv_hook_load_options_default())
        o.first_token, o.token_count = first, count
        at = int32_array(positions, "positions") if positions is not None else None
        if at is not None:
            if len(at) != count:
                raise ValueError(f"positions: {len(at)}, expected {count}")
            o.positions = pointer_to(at)
        with borrowed() as context, Callbacks(ready=on_group) as callbacks:
            o.group_ready, o.group_ready_user = callbacks.layers_ready, callbacks.user
            call_with(context, lib.xkv_hook_load, self._handle.pointer, g, views.pointer, o)
        del kept


class Hook(Owner):
    """All methods but close() may be called from any number of threads at once."""

    def __init__(self, store: Store, *, save_threads: int = 1, pack_threads: int = 1, queue_saves: int = 64,
                 queue_bytes: int = 1 << 30, wait_ms: int = 0, **options: Unpack[PackOptions]) -> None:
        """save_threads: saves packed at once. pack_threads: threads of one save. queue_saves, queue_bytes: saves on their
        way, and memory of their copies. wait_ms: how long save() waits for room before it drops the save. options: how
        saves are packed (lossless unless given); a dictionary must be in the store."""
        o = ffi.new("xkv_hook_options *", lib.xkv_hook_options_default())
        o.save_threads, o.pack_threads, o.queue_saves = save_threads, pack_threads, queue_saves
        o.queue_bytes, o.wait_ms = queue_bytes, wait_ms
        contexts = context_options(0, _Settings.memory_limit)
        packing, keep = pack_options(dict(options), Callbacks(), None)
        o.context, o.pack = contexts, packing
        self.store = store
        self._handle = Handle("xkv_hook", lib.xkv_hook_create, (store.pointer, o), _close_hook,
                              (store, packing, tuple(keep)))
        self._hits: weakref.WeakSet[Handle] = weakref.WeakSet()
        store._on_close(self)

    def __enter__(self) -> Hook:
        return self

    @property
    def pointer(self) -> Any:
        """xkv_hook *"""
        return self._handle.pointer

    def close(self) -> None:
        """Cancel saves on their way (flush() before keeps them), close what it found, and end."""
        for hit in list(self._hits):
            hit.close()
        super().close()

    def match(self, namespace: Namespace, tokens: PromptLike, *, min_tokens: int = 1, page_tokens: int = 1,
              have_tokens: int = 0, compute_tokens: int = 1, seconds_per_token: float = 0.0) -> HookMatch:
        """The longest stored prefix. A miss is a false HookMatch with the reason.

        page_tokens: whole pages are reused. have_tokens: leading tokens the engine has. compute_tokens: tokens at the end
        that are computed in any case. seconds_per_token: what computing takes; a load that takes longer is "declined"."""
        o = ffi.new("xkv_hook_match_options *", lib.xkv_hook_match_options_default())
        o.min_tokens, o.page_tokens, o.have_tokens = min_tokens, page_tokens, have_tokens
        o.compute_tokens, o.seconds_per_token = compute_tokens, seconds_per_token
        prompt, found = prompt_of(tokens), ffi.new("xkv_hook_found *")
        handle = Handle("xkv_hook_hit", lib.xkv_hook_match, (self.pointer, namespace.pointer, prompt.pointer, o, found),
                        _close_hit, (self,))
        if handle.closed:
            return HookMatch(found, None)
        self._hits.add(handle)
        return HookMatch(found, handle)

    def save(self, namespace: Namespace, tokens: PromptLike, geometry: Geometry, arrays: Sequence[Any], *,
             rows: Optional[Any] = None, ttl: int = 0, pin: bool = False, keys: Optional[List[PageKey]] = None) -> Saved:
        """Copy the rows of a prompt; they are packed and stored in the background.

        geometry may have more tokens than the prompt. arrays[i] of plane i: [tokens, heads, head_dim], in the plane's
        type; or Pages. rows: [geometry.tokens] where the tokens are in each array."""
        prompt, saved = prompt_of(tokens), ffi.new("xkv_hook_saved *")
        views = Planes(geometry, arrays, rows).views
        g, kept = geometry.to_c()
        o = ffi.new("xkv_hook_save_options *", lib.xkv_hook_save_options_default())
        names, o.key_count = page_keys(keys)
        o.ttl, o.pin, o.keys = ttl, pin, names
        call(lib.xkv_hook_save, self.pointer, namespace.pointer, prompt.pointer, g, views.pointer, o, saved)
        del kept
        return Saved(OUTCOMES[saved.outcome], int(saved.ticket))

    def cancel(self, ticket: int = 0) -> int:
        """Cancel the save of a ticket, or all; how many were asked to stop."""
        return int(lib.xkv_hook_cancel(self.pointer, ticket))

    def flush(self, timeout: Optional[float] = None) -> None:
        """Wait until all saves queued before are done. TimeoutError: after `timeout` seconds; they go on."""
        milliseconds = FOREVER if timeout is None else min(int(timeout * 1000), FOREVER - 1)
        call(lib.xkv_hook_flush, self.pointer, milliseconds)

    @property
    def counters(self) -> HookCounters:
        counters = ffi.new("xkv_hook_counters *")
        lib.xkv_hook_get_counters(self.pointer, counters)
        return record(HookCounters, counters)


def _close_hook(_ctx: Any, hook: Any) -> None:
    lib.xkv_hook_close(hook)


def _close_hit(_ctx: Any, hit: Any) -> None:
    lib.xkv_hook_hit_close(hit)
