"""A cache for Llama.set_cache()."""
from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, List, Optional, Sequence, Union

import llama_cpp
import numpy as np
from llama_cpp.llama_cache import BaseLlamaCache

from .._call import logger
from ..dictionary import Dictionary
from ..errors import XkvError
from ..store import Store
from .prefixes import Prefixes
from .state import EngineError, context_of_sequence, sequence_of_context

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._files import Path
    from ..packing import PackSettings


class LlamaCache(BaseLlamaCache):  # type: ignore[misc]
    """Keeps what a Llama computes in a store, packed, and gives back the longest prefix of a prompt.

    It survives the process, is shared with others, and is found by this model with these settings only. A state that
    cannot be stored is logged and counted in `failures`; generation goes on."""

    def __init__(self, llama: Any, store: Store, *, min_tokens: int = 16, background: bool = False,
                 dictionary: Union[Dictionary, Path, None] = None, salt: bytes = b"",
                 **options: Unpack[PackSettings]) -> None:
        """background: pack and store on a thread; flush() waits for it. Other arguments: as of Prefixes."""
        super().__init__()
        self.prefixes = Prefixes(llama, store, dictionary=dictionary, salt=salt, **options)
        self.min_tokens, self.failures, self.last_miss = min_tokens, 0, ""
        self._vocabulary = llama.n_vocab()
        self._capacity = llama.n_ctx()
        self._pool: Optional[ThreadPoolExecutor] = ThreadPoolExecutor(1) if background else None
        self._running: List[Future[None]] = []
        self._lock = threading.Lock()

    @property
    def cache_size(self) -> int:
        """Bytes of all entries in the store."""
        return self.prefixes.store.stat().bytes

    def __contains__(self, key: Sequence[int]) -> bool:
        try:
            return self.prefixes.store.peek(self.prefixes.namespace, key, min_tokens=self.min_tokens).reason == "found"
        except XkvError as error:
            logger.warning("the store cannot be searched: %s", error)
            return False

    def __getitem__(self, key: Sequence[int]) -> Any:
        """llama_cpp.LlamaState of the longest stored prefix. KeyError: none; `last_miss` says why."""
        tokens = list(key)
        with self.prefixes.find(tokens, self.min_tokens) as found:
            image, reason = None, found.reason
            if found.match is not None:
                image, reason = self.prefixes._image(found.match, found.tokens)
        if image is None:
            self.last_miss = reason
            raise KeyError(reason)
        state = context_of_sequence(image, self.prefixes.identity.model.architecture)
        ids = np.full(self._capacity, -1, np.intc)
        ids[:found.tokens] = tokens[:found.tokens]
        no_scores = np.zeros((1, self._vocabulary), np.single)  # the engine computes those of the last token again
        return llama_cpp.LlamaState(ids, no_scores, found.tokens, state, len(state), llama_cpp.LLAMA_DEFAULT_SEED)

    def __setitem__(self, key: Sequence[int], value: Any) -> None:
        tokens = value.input_ids[:value.n_tokens].tolist()
        if self._pool is None:
            self._put(tokens, value.llama_state)
        else:
            with self._lock:
                self._running = [job for job in self._running if not job.done()]
                self._running.append(self._pool.submit(self._put, tokens, value.llama_state))

    def flush(self) -> None:
        """Wait until all that was given to it is stored."""
        with self._lock:
            jobs, self._running = self._running, []
        for job in jobs:
            job.result()

    def _put(self, tokens: List[int], state: bytes) -> None:
        if len(tokens) < self.min_tokens:
            return
        try:
            self.prefixes.put(sequence_of_context(state, tokens), tokens)
        except (XkvError, EngineError) as error:
            self.failures += 1
            logger.warning("a state of %d tokens is not stored: %s", len(tokens), error)
