"""Stored prefixes of a llama_cpp.Llama: restore into its context, save from it."""
from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Optional, Sequence, Tuple, Union

from .._call import logger
from ..cache import Cache
from ..dictionary import Dictionary
from ..errors import UnsupportedError, XkvError
from ..store import Match, Store
from ..store_types import PutReport
from .identity import Identity
from .state import EngineError, cut_sequence, load_sequence, save_context, save_sequence

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._files import Path
    from ..packing import PackSettings

_WRITER = re.compile(r"prefill ([0-9.]+) s for ([0-9]+) tokens")


@dataclass(frozen=True)
class Restored:
    """What restore() did. False: nothing, and `reason` says why."""

    tokens: int = 0                  # leading tokens of the prompt that the engine has now
    reason: str = "found"
    bytes: int = 0                   # of the stored entry
    raw_bytes: int = 0               # of the restored tokens, as the engine holds them
    seconds: float = 0.0             # finding, decoding, handing over
    replaced_seconds: Optional[float] = None  # what computing these tokens took when they were saved

    def __bool__(self) -> bool:
        return self.tokens > 0


class Prefixes:
    """Prefixes in a store, for one model and its settings."""

    def __init__(self, llama: Any, store: Store, *, dictionary: Union[Dictionary, Path, None] = None, salt: bytes = b"",
                 **options: Unpack[PackSettings]) -> None:
        """llama: llama_cpp.Llama. dictionary: to pack with, opened or a file; it is put into the store when something is
        saved. salt: of the tenant. options: how saves are packed, lossless unless a target or dictionary is given."""
        self.llama, self.store, self.salt, self.options = llama, store, salt, options
        self.identity = Identity(llama)
        self.namespace = self.identity.namespace(salt)
        self._dictionary = dictionary

    # --- Restoring ---

    def restore(self, tokens: Sequence[int], min_tokens: int = 16) -> Restored:
        """Put the longest stored prefix of `tokens` into the engine, at least one token short of all.

        Whatever fails is a miss: then the engine keeps what it has, or has nothing, and computes the rest."""
        start = time.perf_counter()
        with self.find(tokens, min_tokens) as found:
            if found.match is None:
                return Restored(reason=found.reason)
            if self._held(tokens) >= found.tokens:
                return Restored(reason="the engine holds as much already")
            image, reason = self._image(found.match, found.tokens)
            if image is None:
                return Restored(reason=reason)
            replaced = self._replaced(found.match, found.tokens)
            sizes = found.match.bytes, found.match.raw_bytes
        try:
            load_sequence(self.llama.ctx, image)
            cut_sequence(self.llama.ctx, found.tokens)
        except EngineError as error:
            self.llama.n_tokens = 0
            return Restored(reason=str(error))
        self.llama.input_ids[:found.tokens] = tokens[:found.tokens]
        self.llama.n_tokens = found.tokens
        return Restored(found.tokens, "found", *sizes, time.perf_counter() - start, replaced)

    def _held(self, tokens: Sequence[int]) -> int:
        """Leading tokens that the engine has."""
        return len(os.path.commonprefix([self.llama.input_ids[:self.llama.n_tokens].tolist(), list(tokens)]))

    def find(self, tokens: Sequence[int], min_tokens: int = 16) -> Found:
        """The entry behind restore()."""
        try:
            match = self.store.match(self.namespace, tokens, min_tokens=min_tokens)
        except XkvError as error:
            return Found(None, 0, f"the store cannot be searched: {error}")
        usable = min(match.tokens, len(tokens) - 1, self.llama.n_ctx() - 1)
        if match and usable >= min_tokens:
            return Found(match, usable, "found")
        match.close()
        try:
            return Found(None, 0, self._why(match, tokens))
        except XkvError as error:
            return Found(None, 0, f"{match.reason}; the store cannot be searched further: {error}")

    def _why(self, match: Match, tokens: Sequence[int]) -> str:
        """A reason that helps: a miss for other settings is one for want of entries, too."""
        if match.reason == "whole only":
            return "what is stored of this prompt can only be restored as the whole prefix that it is"
        if match.reason not in ("none", "short"):
            return f"the stored entry is not usable: {match.reason}"
        for difference, namespace in self.identity.relatives(self.salt):
            if self.store.peek(namespace, tokens).tokens > match.tokens:
                return f"stored by this model with other settings ({difference})"
        entries = self.store.stat().entries
        if not entries:
            return "the store is empty"
        if not self.store.ls(self.namespace):
            return f"none of the {entries} stored entries was made by this model with these settings"
        return "no stored prompt begins like this one"

    def _image(self, match: Match, tokens: int) -> Tuple[Optional[bytearray], str]:
        """The sequence file of the first `tokens`, or of one more: a window without the tokens before it can only be
        restored as a whole, and then holds what the last token needs to be computed again."""
        try:
            match.check_model(self.identity.model)
            try:
                return match.restore(tokens), ""
            except UnsupportedError:
                if match.tokens == tokens:
                    raise
                return match.restore(tokens + 1), ""
        except XkvError as error:
            logger.warning("a stored prefix of %d tokens is not used: %s", tokens, error)
            return None, f"the stored entry is not usable: {error}"

    @staticmethod
    def _replaced(match: Match, tokens: int) -> Optional[float]:
        found = _WRITER.search(str(match.values.get("writer", "")))
        return float(found[1]) / int(found[2]) * tokens if found else None

    # --- Saving ---

    def save(self, tokens: Optional[Sequence[int]] = None, prefill_seconds: Optional[float] = None) -> PutReport:
        """Store what the engine has computed: `tokens` (None: all it holds). prefill_seconds is kept with it, to tell
        what a later restore() replaces."""
        tokens = self.llama.input_ids[:self.llama.n_tokens].tolist() if tokens is None else list(tokens)
        save = save_context if self.identity.keeps_windows else save_sequence
        return self.put(save(self.llama.ctx, tokens), tokens, prefill_seconds)

    def put(self, image: Union[bytes, bytearray], tokens: Sequence[int],
            prefill_seconds: Optional[float] = None) -> PutReport:
        """Store a sequence file of this engine in memory. A target that so short a prompt cannot reach is left out."""
        options: Dict[str, Any] = dict(self.options)
        dictionary = self._opened_dictionary()
        if dictionary is not None:
            options["dictionary"] = dictionary
        took = f"; prefill {prefill_seconds:.3f} s for {len(tokens)} tokens" if prefill_seconds else ""
        options.setdefault("writer", f"xkv.llama{took}")
        with Cache.open(image, self.identity.model, name="the engine's state") as cache:
            return self.store.put_reachable(self.namespace, cache, tokens, **options)

    def _opened_dictionary(self) -> Optional[Dictionary]:
        if self._dictionary is None or isinstance(self._dictionary, Dictionary):
            return self._dictionary
        self.store.put_dictionary(self._dictionary)
        self._dictionary = Dictionary.open(self._dictionary)
        return self._dictionary


class Found:
    """An entry that serves a prompt, or the reason why there is none."""

    def __init__(self, match: Optional[Match], tokens: int, reason: str) -> None:
        self.match, self.tokens, self.reason = match, tokens, reason

    def __enter__(self) -> Found:
        return self

    def __exit__(self, *_: object) -> None:
        if self.match is not None:
            self.match.close()
