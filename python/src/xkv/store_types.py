"""What the calls of a store return."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from .packing import PackReport

Bytes = bytes  # fields are named as in C, where `bytes` is a number of them
MATCH_REASONS = {0: "found", 1: "none", 2: "short", 3: "expired", 4: "no dictionary", 5: "corrupt", 6: "gone",
                 7: "newer", 8: "whole only", 100: "declined"}


@dataclass(frozen=True)
class PutReport:
    """What put() did."""

    id: int                       # of the entry
    existed: bool                 # the very prompt was stored already: its use, pin and ttl were renewed, no more
    tokens: int
    bytes: int                    # of the blob
    evicted_entries: int          # to make room
    evicted_bytes: int
    parent: int                   # the entry that this one extends; 0: none
    base_tokens: int              # tokens that it takes from there
    pack: Optional[PackReport]    # when put() packed


@dataclass(frozen=True)
class StoreItem:
    """One entry."""

    id: int
    tokens: int
    pinned: bool
    bytes: int            # of the blob
    raw_bytes: int        # of the cache as the engine holds it
    created: int          # microseconds since 1970
    expires: int          # the same; 0: never
    used: int
    needs_dict: bool
    dictionary_id: Bytes
    key: Bytes            # the last of the native chain
    blob: Bytes           # SHA-256 of the blob file
    parent: int
    base_tokens: int
    children: int         # entries that extend it


@dataclass(frozen=True)
class StoreStats:
    """Sums over the life of a store."""

    block_tokens: int
    read_only: bool
    byte_cap: int
    bytes: int
    entries: int
    pinned: int
    namespaces: int
    dictionaries: int
    index_bytes: int
    map_bytes: int
    quarantined: int
    quarantined_bytes: int
    puts: int
    hits: int
    misses: int
    evictions: int
    expirations: int
    corrupt: int
    tokens_reused: int
    bytes_reused: int
    extending: int
    bytes_shared: int


@dataclass(frozen=True)
class CollectReport:
    """What gc() and set_cap() removed."""

    expired: int
    evicted: int
    freed_bytes: int
    orphans: int
    leftovers: int
    dictionaries: int


@dataclass(frozen=True)
class VerifyReport:
    """What verify() found; all but the first three are wrong."""

    entries: int
    dictionaries: int
    bytes: int
    damaged: int
    missing: int
    unreachable: int
    orphans: int
    wrong_sums: int
    bad_records: int
    first: str        # what was wrong first

    @property
    def sound(self) -> bool:
        return not (self.damaged or self.missing or self.unreachable or self.orphans or self.wrong_sums
                    or self.bad_records)


@dataclass(frozen=True)
class RepairReport:
    """What repair() did."""

    entries: int
    dictionaries: int
    quarantined: int
    newer: int
    kept_uses: bool
    lost_properties: bool


@dataclass(frozen=True)
class PushReport:
    """What push() sent."""

    sent: int
    dropped: int
    waiting: int  # still to be sent: the remote failed, or another process is sending
    why: str


@dataclass(frozen=True)
class RemoteStats:
    """Sums since the remote was attached."""

    hits: int
    misses: int
    skipped: int
    errors: int
    retries: int
    damaged: int
    sent: int
    dropped: int
    waiting: int
    bytes_in: int
    bytes_out: int
