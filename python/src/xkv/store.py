"""The store: a folder of packed prefixes, found by the prompts that made them."""
from __future__ import annotations

import atexit
import contextlib
import weakref
from typing import TYPE_CHECKING, Any, Iterator, List, Optional, Sequence, Tuple, Type, TypeVar, Union

from ._call import Callbacks, Context, Handle, Owner, Progress, borrowed, call, call_with, logger
from ._files import Input, Path, Source, encoded, to_bytes, to_file
from ._native import ffi, lib
from ._structs import record
from .cache import Cache, Planes
from .entry import EntryReader
from .errors import DataError, TargetError
from .geometry import Geometry
from .packing import Packed, PackReport, pack_options
from .prompt import Namespace, PageKey, PromptLike, page_keys, prompt_of
from .store_types import (
    MATCH_REASONS,
    CollectReport,
    PushReport,
    PutReport,
    RemoteStats,
    RepairReport,
    StoreItem,
    StoreStats,
    VerifyReport,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .packing import PackOptions

T = TypeVar("T")
ACCESS = {"read-write": 0, "read-only": 1, "auto": 2}


class Match(EntryReader):
    """What a lookup found: true when tokens can be restored, and then safe from eviction until close(). For one thread
    at a time. An entry that turns out damaged goes into quarantine and is not found again.

    with store.match(namespace, tokens) as match:
        if match:
            image = match.restore()
    """

    def __init__(self, store: Store, match: Any, handle: Optional[Handle]) -> None:
        self._store, self._handle = store, handle
        self.reason = MATCH_REASONS.get(match.reason, str(match.reason))
        self.tokens = int(match.tokens)              # leading tokens that can be restored
        self.entry_tokens = int(match.entry_tokens)  # of the entry that has them
        self.id = int(match.id)                      # of the entry
        self.bytes = int(match.bytes)                # of its blob, and of its share of those that it extends
        self.raw_bytes = int(match.raw_bytes)        # of the matched tokens, as the engine holds them
        self._whole_only = bool(match.whole_only)
        self.keys = int(match.keys)                  # match_keys(): leading keys that are stored
        self._entry: Any = None
        self._geometry: Optional[Geometry] = None

    def __bool__(self) -> bool:
        return self._handle is not None and not self._handle.closed

    def __enter__(self) -> Match:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<xkv.Match {self.reason}, {self.tokens} tokens>"

    def close(self) -> None:
        """The entry may be evicted again. Not while a call uses it."""
        self._entry = None
        if self._handle is not None:
            self._handle.close()

    @property
    def whole_only(self) -> bool:
        """Whether restore() gives all of these tokens or none, as Entry.whole_only."""
        return self._whole_only

    def _hit(self) -> Handle:
        if self._handle is None:
            raise ValueError(f"nothing was found: {self.reason}")
        return self._handle

    @property
    def entry_pointer(self) -> Any:
        """const xkv_entry *, with its dictionary attached"""
        if self._entry is None:
            hit, entry = self._hit(), ffi.new("xkv_entry **")
            with self._rejecting():
                call_with(hit.context, lib.xkv_hit_entry, hit.pointer, entry)
            self._entry = entry[0]
        return self._entry

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        """Of the entry."""
        if self._geometry is None:
            self._geometry = Geometry.from_c(lib.xkv_entry_geometry(self.entry_pointer))
        return self._geometry

    def _read(self, context: Context, options: Any, views: Any) -> None:
        hit = self._hit()
        call_with(hit.context, lib.xkv_hit_read, hit.pointer, options, views)

    def _token_limit(self) -> int:
        return self.tokens

    def reject(self) -> None:
        """Put the entry into quarantine: for data that could not be decoded."""
        hit = self._hit()
        lib.xkv_hit_reject(hit.context.pointer, hit.pointer)

    def restored_size(self, tokens: int = 0) -> int:
        """Bytes of the engine's file for the first tokens (0: all that matched)."""
        return super().restored_size(tokens or self.tokens)

    def _restore(self, context: Context, tokens: int, image: Any, size: int, progress: Optional[Progress]) -> None:
        with self._rejecting():
            super()._restore(context, tokens or self.tokens, image, size, progress)

    @contextlib.contextmanager
    def _rejecting(self) -> Iterator[None]:
        """What turns out damaged is not found again."""
        try:
            yield
        except DataError:
            self.reject()
            raise


class Store(Owner):
    """An opened store. For any number of threads; a folder is opened once in a process, and not across fork()."""

    def __init__(self, handle: Handle, path: Path) -> None:
        self._handle, self.path = handle, path
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()  # hits and hooks, which must be closed before it
        _open_stores.add(self)

    @classmethod
    def init(cls, path: Path, *, cap: int = 0, block_tokens: int = 256, key: Optional[bytes] = None) -> Store:
        """Make a store at `path`, a folder that does not exist or is empty, and open it.

        cap: bytes of all blobs, above which the least recently used are evicted; 0: none.
        key: 32 random bytes to encrypt all blobs with."""
        p = ffi.new("xkv_store_properties *", lib.xkv_store_properties_default())
        keep = _key(key)
        p.byte_cap, p.block_tokens, p.key = cap, block_tokens, keep
        call(lib.xkv_store_create, encoded(path), p)
        return cls.open(path, key=key)

    @classmethod
    def open(cls, path: Path, *, access: str = "read-write", key: Optional[bytes] = None, trust_index: bool = False) -> Store:
        """Open the store at `path`. access: "read-write", "read-only", "auto" (as the file system allows).

        trust_index leaves out the check of every index page."""
        if access not in ACCESS:
            raise ValueError(f"access: {access!r}, expected one of {', '.join(ACCESS)}")
        o = ffi.new("xkv_store_options *", lib.xkv_store_options_default())
        keep = _key(key)
        o.access, o.trust_index, o.key = ACCESS[access], trust_index, keep
        return cls(Handle("xkv_store", lib.xkv_store_open, (encoded(path), o), lib.xkv_store_close), path)

    def __enter__(self) -> Store:
        return self

    def __repr__(self) -> str:
        return f"<xkv.Store {str(self.path)!r}{', closed' if self.closed else ''}>"

    @property
    def pointer(self) -> Any:
        """xkv_store *"""
        return self._handle.pointer

    def close(self) -> None:
        """Close it, what it has found, and hooks on it."""
        for user in list(self._users):
            user.close()
        super().close()

    def _on_close(self, user: Any) -> None:
        self._users.add(user)

    # --- Putting ---

    def put(self, namespace: Namespace, entry: Union[Source, Packed], tokens: Optional[PromptLike] = None, *, ttl: int = 0,
            pin: bool = False, keys: Optional[Sequence[PageKey]] = None) -> PutReport:
        """Store a packed entry under the prompt that made it (None: the token ids in the entry). On return it is on disk.

        ttl: seconds until it expires, 0: never. pin: never evict it. keys: names in an engine's scheme."""
        data = Input(entry.data if isinstance(entry, Packed) else entry)
        prompt = prompt_of(tokens) if tokens is not None else None
        o, keep = _put_options(ttl, pin, keys)
        report = ffi.new("xkv_put_report *")
        call(lib.xkv_store_put, self.pointer, namespace.pointer, prompt.pointer if prompt else ffi.NULL, data.pointer, o,
             report)
        del keep
        return _put_report(report, False)

    def put_cache(self, namespace: Namespace, source: Union[Cache, Planes], tokens: Optional[PromptLike] = None, *,
                  ttl: int = 0, pin: bool = False, keys: Optional[Sequence[PageKey]] = None, whole: bool = False,
                  progress: Optional[Progress] = None, **options: Unpack[PackOptions]) -> PutReport:
        """Pack a cache or planes straight into the store. tokens: the prompt (None: the token ids of the geometry); the
        dictionary must be in the store. Where another entry begins like the prompt only what follows is packed, unless
        `whole`."""
        geometry, kept = source.geometry.to_c()
        prompt = prompt_of(source.geometry.token_ids if tokens is None else tokens)
        o, keep = _put_options(ttl, pin, keys)
        o.whole = whole
        report = ffi.new("xkv_put_report *")
        with Callbacks(progress) as callbacks:
            o.pack, packing = pack_options(dict(options), callbacks, source.model if isinstance(source, Cache) else None)
            if isinstance(source, Cache):
                size = ffi.new("uint64_t *")
                data = lib.xkv_cache_data(source.pointer, size)
                from_file = (lib.xkv_cache_geometry(source.pointer), lib.xkv_cache_views(source.pointer),
                             lib.xkv_cache_framing(source.pointer), data, size[0])
            else:
                from_file = (geometry, source.views.pointer, ffi.NULL, ffi.NULL, 0)
            call(lib.xkv_store_put_planes, self.pointer, namespace.pointer, prompt.pointer, *from_file, o, report)
            del kept, keep, packing
        return _put_report(report, True)

    def put_reachable(self, namespace: Namespace, source: Union[Cache, Planes], tokens: PromptLike,
                      **options: Any) -> PutReport:
        """put_cache(); a target out of reach is left out: for prompts of a few tokens, whose sinks alone are more than that,
        and for windows that are carried as they are."""
        try:
            return self.put_cache(namespace, source, tokens, **options)
        except TargetError as error:
            logger.info("%d tokens are packed without the target: %s", source.geometry.tokens, error)
            for target in ("ratio", "error", "energy"):
                options.pop(target, None)
            return self.put_cache(namespace, source, tokens, **options)

    def put_dictionary(self, source: Source) -> bytes:
        """Store a dictionary, once for each id; its id."""
        data, identity = Input(source), ffi.new("uint8_t[16]")
        call(lib.xkv_store_put_dict, self.pointer, data.pointer, identity)
        return bytes(ffi.buffer(identity))

    # --- Finding ---

    def match(self, namespace: Namespace, tokens: PromptLike, *, min_tokens: int = 1) -> Match:
        """The entry with the longest common prefix with the prompt. A miss is a false Match with the reason."""
        prompt = prompt_of(tokens)
        return self._found(lib.xkv_store_match, namespace.pointer, prompt.pointer, min_tokens)

    def match_keys(self, namespace: Namespace, keys: Sequence[bytes]) -> Match:
        """The same by an engine's keys [32 bytes]: keys[i] names everything up to and with page i."""
        return self._found(lib.xkv_store_match_keys, namespace.pointer, _key_array(keys), len(keys))

    def get(self, namespace: Namespace, id: int) -> Match:
        """The entry by its id. NotFoundError: there is none, or it is another namespace's."""
        return self._found(lib.xkv_store_get, namespace.pointer, id)

    def peek(self, namespace: Namespace, tokens: PromptLike, *, min_tokens: int = 1) -> Match:
        """Only ask: false, but with tokens and reason as match(); no use of the entry, and neither hit nor miss."""
        match, prompt = ffi.new("xkv_match *"), prompt_of(tokens)
        call(lib.xkv_store_match, self.pointer, namespace.pointer, prompt.pointer, min_tokens, match, ffi.NULL)
        return Match(self, match, None)

    def peek_keys(self, namespace: Namespace, keys: Sequence[bytes]) -> Match:
        """Only ask, as peek()."""
        match = ffi.new("xkv_match *")
        call(lib.xkv_store_match_keys, self.pointer, namespace.pointer, _key_array(keys), len(keys), match, ffi.NULL)
        return Match(self, match, None)

    def _found(self, function: Any, *arguments: Any) -> Match:
        match = ffi.new("xkv_match *")
        handle = Handle("xkv_hit", function, (self.pointer, *arguments, match), lib.xkv_hit_close, (self,))
        if handle.closed:
            return Match(self, match, None)
        self._on_close(handle)
        return Match(self, match, handle)

    # --- Keeping ---

    def ls(self, namespace: Namespace) -> List[StoreItem]:
        """Entries of a namespace, in order of id."""
        items: List[StoreItem] = []
        with borrowed() as context, Callbacks(ready=lambda item: items.append(record(StoreItem, item))) as callbacks:
            call_with(context, lib.xkv_store_list, self.pointer, namespace.pointer, callbacks.store_item, callbacks.user)
        return items

    def pin(self, namespace: Namespace, id: int, pinned: bool = True) -> None:
        """Keep an entry, and those that it extends, from eviction; or no more."""
        call(lib.xkv_store_pin, self.pointer, namespace.pointer, id, pinned)

    def rm(self, namespace: Namespace, id: int) -> None:
        """Remove an entry and all that extend it, pinned ones too."""
        call(lib.xkv_store_remove, self.pointer, namespace.pointer, id)

    def rm_all(self, namespace: Namespace) -> int:
        """Remove all of a namespace; how many entries."""
        removed = ffi.new("uint64_t *")
        call(lib.xkv_store_remove_namespace, self.pointer, namespace.pointer, removed)
        return int(removed[0])

    def stat(self) -> StoreStats:
        return self._report(StoreStats, "xkv_store_stats", lib.xkv_store_get_stats)

    def set_cap(self, cap: int) -> CollectReport:
        """Change the byte cap, and evict down to it."""
        return self._report(CollectReport, "xkv_collect_report", lib.xkv_store_set_cap, cap)

    def gc(self, *, unused_dictionaries: bool = False) -> CollectReport:
        """Remove what is expired, above the cap, orphaned, left over or in quarantine."""
        return self._report(CollectReport, "xkv_collect_report", lib.xkv_store_collect, unused_dictionaries)

    def verify(self, *, decode: bool = False, progress: Optional[Progress] = None) -> VerifyReport:
        """Check every record and blob; with `decode` also decode everything. Nothing is changed."""
        with Callbacks(progress) as callbacks:
            return self._report(VerifyReport, "xkv_verify_report", lib.xkv_store_verify, decode, callbacks.progress,
                                callbacks.user)

    @staticmethod
    def repair(path: Path, *, key: Optional[bytes] = None, compact_only: bool = False) -> RepairReport:
        """Rebuild the index of the store at `path`, which must not be open, from its blobs."""
        report, keep = ffi.new("xkv_repair_report *"), _key(key)
        call(lib.xkv_store_repair, encoded(path), keep, compact_only, report)
        return record(RepairReport, report)

    def export(self, namespace: Namespace, id: int) -> bytes:
        """One entry and whatever it needs, as bytes that any store can import; not encrypted."""
        with borrowed() as context:
            return to_bytes(self._exporter(namespace, id), context)

    def export_file(self, namespace: Namespace, id: int, path: Path, *, overwrite: bool = False) -> None:
        """The same as a file."""
        with borrowed() as context:
            to_file(self._exporter(namespace, id), context, path, overwrite)

    def _exporter(self, namespace: Namespace, id: int) -> Any:
        return lambda context, output: call_with(context, lib.xkv_store_export, self.pointer, namespace.pointer, id, output)

    def import_(self, source: Source) -> PutReport:
        """Store what export wrote, in the namespace it came from."""
        data, report = Input(source), ffi.new("xkv_put_report *")
        call(lib.xkv_store_import, self.pointer, data.pointer, report)
        return _put_report(report, False)

    def _report(self, kind: Type[T], struct: str, function: Any, *arguments: Any) -> T:
        report = ffi.new(f"{struct} *")
        call(function, self.pointer, *arguments, report)
        return record(kind, report)

    # --- Remote tier ---

    def attach_remote(self, url: str, *, lookup_ms: int = 5000, send_ms: int = 60000, retries: int = 2,
                      pause_ms: int = 1000, object_bytes: int = 512 << 20, manual: bool = False) -> None:
        """Share the entries through s3://BUCKET[/PREFIX] or redis://HOST[:PORT][/DATABASE]; before other threads use the
        store. manual: only push() sends."""
        o = ffi.new("xkv_remote_options *", lib.xkv_remote_options_default())
        name = ffi.new("char[]", url.encode())
        o.url, o.lookup_ms, o.send_ms, o.retries, o.pause_ms = name, lookup_ms, send_ms, retries, pause_ms
        o.object_bytes, o.manual = object_bytes, manual
        call(lib.xkv_store_attach_remote, self.pointer, o)

    def push(self) -> PushReport:
        """Send what is waiting, until nothing waits or the remote fails, which is no error."""
        return self._report(PushReport, "xkv_push_report", lib.xkv_store_push)

    def queue_all(self, namespace: Namespace) -> None:
        """Note all entries of a namespace as to be sent."""
        call(lib.xkv_store_queue_all, self.pointer, namespace.pointer)

    def remote_stats(self) -> RemoteStats:
        return self._report(RemoteStats, "xkv_remote_stats", lib.xkv_store_get_remote_stats)


_open_stores: weakref.WeakSet[Store] = weakref.WeakSet()


@atexit.register
def _close_stores() -> None:
    """Before the interpreter goes: threads of hooks log through it."""
    for store in list(_open_stores):
        store.close()


def _key(key: Optional[bytes]) -> Any:
    if key is None:
        return ffi.NULL
    if len(key) != 32:
        raise ValueError(f"key: {len(key)} bytes, expected 32")
    return ffi.new("uint8_t[]", key)


def _key_array(keys: Sequence[bytes]) -> Any:
    array = ffi.new("uint8_t[][32]", max(len(keys), 1))
    for c, key in zip(array, keys):
        if len(key) != 32:
            raise ValueError(f"key: {len(key)} bytes, expected 32")
        ffi.memmove(c, key, 32)
    return array


def _put_options(ttl: int, pin: bool, keys: Optional[Sequence[PageKey]]) -> Tuple[Any, List[object]]:
    o = ffi.new("xkv_put_options *", lib.xkv_put_options_default())
    o.ttl, o.pin = ttl, pin
    names, o.key_count = page_keys(keys)
    o.keys = names
    return o, [names]


def _put_report(report: Any, packed: bool) -> PutReport:
    did_pack = packed and report.pack.entry_bytes
    return record(PutReport, report, pack=PackReport.from_c(report.pack) if did_pack else None)
