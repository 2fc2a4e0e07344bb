"""The connector: what vLLM calls in its scheduler and in its workers."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Set, Tuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from .._serving import Config, Failures, SharedStore, missing
from .caches import Layout
from .identity import Identity, Prefix
from .worker import Transfer, Worker


@dataclass
class XkvMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler asks of the workers in one step."""

    loads: List[Transfer] = field(default_factory=list)
    saves: List[Transfer] = field(default_factory=list)


@dataclass
class _Running:
    """A request with blocks, as the scheduler knows it."""

    prefix: Prefix
    blocks: List[int]
    saved: bool = False
    held: List[Any] = field(default_factory=list)  # matches, which keep entries from eviction until they are loaded


class XkvConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Nothing raises into the scheduler or a forward pass: what fails is a miss, is logged once and counted in `failures`.
    Loads are asynchronous unless "load_async" is false: the request waits, others go on."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """ValueError: an option is wrong, or the model or its cache is of a kind that is not supported, and why."""
        super().__init__(vllm_config, role, kv_cache_config)
        self.failures = Failures("vllm")
        extra = dict(self._kv_transfer_config.kv_connector_extra_config)
        self._load_async = bool(extra.pop("load_async", True))
        self._min_tokens = int(extra.pop("min_tokens", 64))
        self._block = int(vllm_config.cache_config.block_size)
        axes = str(extra.pop("layout", "BHNC"))
        config = Config.of(extra)
        layout = Layout(kv_cache_config, vllm_config.model_config.hf_text_config, axes, self._block)
        self._identity = Identity(vllm_config, config, layout)
        self._shared = SharedStore(config)
        self._running: Dict[str, _Running] = {}
        self._prefixes: Dict[str, Prefix] = {}
        self._computed: Dict[str, int] = {}  # tokens that vLLM had itself when it asked last
        self._loads: List[Transfer] = []
        self._worker: Optional[Worker] = None
        if role == KVConnectorRole.WORKER:
            self._worker = Worker(self._shared, self._identity, layout, self.failures)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a save that is dropped is a miss later, no more

    def shutdown(self) -> None:
        """Saves on their way are finished."""
        if self._worker is not None:
            self._worker.close()
        for request in list(self._running):
            self._forget(request)
        self._shared.close()

    # --- Scheduler ---

    @missing(lambda _: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Tuple[Optional[int], bool]:
        """Tokens beyond the computed ones that all ranks have stored: whole blocks, at least one token short of the prompt."""
        self._computed[request.request_id] = num_computed_tokens
        prefix = self._prefix(request)
        if prefix is None or getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        stored = min(self._shared.store.peek(namespace, prefix.prompt()).tokens for namespace in self._identity.ranks(prefix))
        usable = min(stored, len(prefix.tokens) - 1) // self._block * self._block
        found = usable - num_computed_tokens
        return (found, self._load_async) if found >= max(self._min_tokens, 1) else (0, False)

    def _prefix(self, request: Any) -> Optional[Prefix]:
        """The same object as long as the prompt is the same: vLLM asks for waiting requests again and again."""
        known = self._prefixes.get(request.request_id)
        if known is None or len(known.tokens) != len(request.prompt_token_ids or ()):
            known = self._identity.prefix_of(request)
            if known is not None:
                self._prefixes[request.request_id] = known
        return known

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The blocks that vLLM promises to whom get_num_new_matched_tokens() promised tokens."""
        prefix = self._prefix(request)
        if prefix is None:
            return
        self._forget(request.request_id)
        (ids,) = blocks.get_block_ids()
        running = self._running[request.request_id] = _Running(prefix, list(ids))
        if num_external_tokens > 0:
            first = self._computed.get(request.request_id, 0)
            self._loads.append(Transfer(request.request_id, prefix, list(ids), first, first + num_external_tokens))
            self._hold(running)

    @missing(lambda _: None)
    def _hold(self, running: _Running) -> None:
        for namespace in self._identity.ranks(running.prefix):
            running.held.append(self._shared.store.match(namespace, running.prefix.prompt()))

    def build_connector_meta(self, scheduler_output: Any) -> XkvMetadata:
        loads, self._loads = self._loads, []
        return XkvMetadata(loads, self._saves(scheduler_output) or [])

    @missing(lambda _: [])
    def _saves(self, output: Any) -> List[Transfer]:
        """Prompts whose last tokens are computed in this step."""
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for new in output.scheduled_new_reqs:
            if new.req_id in self._running:
                self._running[new.req_id].blocks = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for request, blocks, tokens in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens):
            computed[request] = tokens
            running = self._running.get(request)
            if running is not None and blocks is not None:
                running.blocks = ([] if request in cached.resumed_req_ids else running.blocks) + list(blocks[0])
        return [transfer for request, tokens in computed.items()
                for transfer in self._save(request, tokens + output.num_scheduled_tokens.get(request, 0))]

    def _save(self, request: str, computed: int) -> List[Transfer]:
        running = self._running.get(request)
        if running is None or running.saved or computed < len(running.prefix.tokens):
            return []
        running.saved = True
        end = len(running.prefix.tokens)
        return [Transfer(request, running.prefix, running.blocks, 0, end)] if end >= self._min_tokens else []

    def request_finished(self, request: Any, block_ids: List[int]) -> Tuple[bool, Optional[Dict[str, Any]]]:
        self._forget(request.request_id)
        self._computed.pop(request.request_id, None)
        self._prefixes.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(self, request: Any,
                                    block_ids: Tuple[List[int], ...]) -> Tuple[bool, Optional[Dict[str, Any]]]:
        """The same where vLLM's manager of hybrid caches is on; there is one group all the same."""
        return self.request_finished(request, block_ids[0])

    def _forget(self, request: str) -> None:
        running = self._running.pop(request, None)
        for match in running.held if running is not None else ():
            match.close()

    # --- Workers ---

    def register_kv_caches(self, kv_caches: Dict[str, Any]) -> None:
        """ValueError: tensors of another layout than vLLM documents or "layout" says."""
        if self._worker is not None:
            self._worker.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Starts the loads of this step; waits for them when they are not asynchronous."""
        if self._worker is not None:
            self._worker.load(self._get_connector_metadata().loads, wait=not self._load_async)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: layers are not loaded one by one."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: layers are coded together, in wait_for_save()."""

    def wait_for_save(self) -> None:
        """Copies the rows of prompts that are complete; they are packed and stored in the background."""
        if self._worker is not None:
            self._worker.save(self._get_connector_metadata().saves)

    def get_finished(self, finished_req_ids: Set[str]) -> Tuple[Optional[Set[str]], Optional[Set[str]]]:
        return None, self._worker.finished() if self._worker is not None and self._load_async else None

    def get_block_ids_with_load_errors(self) -> Set[int]:
        """Blocks whose load failed: vLLM computes them."""
        return self._worker.invalid() if self._worker is not None else set()
