"""SGLang: a storage backend of HiCache, loaded by its name.

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "xkv",
        "module_path": "xkv.sglang", "class_name": "XkvStorage", "interface_v1": 1, "hicache_storage_pass_prefix_keys": true,
        "store": "/var/cache/xkv", "cap": 100000000000, "pack": {"error": 0.1}}'

SGLang names a page by a hash of its tokens and all before it, and hands over pages of its pinned host memory, which are
read and written in place. The pages of one call become one entry. With the keys of the pages before them
(hicache_storage_pass_prefix_keys) positions are known, and K is coded before RoPE, which is better by far.

Each rank has its own pages, but for MLA, where they are equal. SGLang calls from a thread that loads and one that saves;
nothing here raises into them: what fails is not stored, or a page that is computed again. `failures` counts it."""
from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

from ._arrays import Array, as_array
from ._page_store import At, PageStore
from ._serving import Config, Failures, SharedStore, missing, rope_of_model
from ._weights import model_fingerprint
from .geometry import Plane
from .pages import Pages, check_page_tokens
from .prompt import Namespace

# Of the host pool's buffer, by --hicache-mem-layout: K kinds, L layers, B pages, N slots of a page, H heads, D dims.
_LAYOUTS = {"layer_first": "KLBNHD", "page_first": "KBNLHD", "page_first_direct": "KBLNHD", "page_head": "KBHNLD"}
_SGLANG = ("backend_name", "module_path", "class_name", "interface_v1", "tp_lcm_size")


class XkvStorage(HiCacheStorage):  # type: ignore[misc]
    """Pages of SGLang in an xkv store. Created, registered and closed by SGLang."""

    def __init__(self, storage_config: Any, kwargs: Optional[Mapping[str, Any]] = None) -> None:
        """storage_config: HiCacheStorageConfig, whose extra_config has the options of xkv. ValueError: an option is wrong,
        or something is asked for that is not supported."""
        self.failures = Failures("sglang")
        self.storage_config = storage_config
        self.config = Config.of(storage_config.extra_config or {}, _SGLANG)
        if getattr(storage_config, "attn_cp_size", 1) > 1 or getattr(storage_config, "dcp_size", 1) > 1:
            raise ValueError("xkv.sglang: context parallel ranks hold slices of pages, which is not supported")
        if getattr(storage_config, "should_split_heads", False):
            raise ValueError("xkv.sglang: splitting heads over ranks of another number (tp_lcm_size) is not supported")
        self._shared = SharedStore(self.config)
        self._pages: Optional[PageStore] = None

    # --- Lifecycle ---

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """ValueError: a pool that cannot be stored; SGLang then does not start with this backend."""
        super().register_mem_pool_host(mem_pool_host)
        pool = self._pool = _Pool(mem_pool_host)
        self._name = self.config.model or self.storage_config.model_name or ""
        rope = rope_of_model(self.config.rope, self._name, pool.planes[0])
        self._pages = PageStore(self._shared, self._namespace(pool), pool.planes, rope)

    def close(self) -> None:
        self._shared.close()

    def clear(self) -> None:
        """Remove all pages of this model, these settings and this rank."""
        if self._pages is not None:
            self._pages.store.rm_all(self._pages.namespace)

    def _namespace(self, pool: _Pool) -> Namespace:
        c = self.storage_config
        settings = f"sglang page={pool.page_tokens} dtype={pool.dtype} layers={pool.layers} pp={c.pp_rank}/{c.pp_size}"
        if not c.is_mla_model:
            settings += f" tp={c.tp_rank}/{c.tp_size}"
        return Namespace(model_fingerprint(self._name), settings=settings)

    # --- Pages of the host pool, in place ---

    @missing(lambda keys: 0)
    def batch_exists(self, keys: List[str], extra_info: Any = None) -> int:
        """How many of the first pages are stored."""
        return self._ready().leading(_digests(keys))

    @missing(lambda keys: [False] * len(keys))
    def batch_get_v1(self, keys: List[str], host_indices: Any, extra_info: Any = None) -> List[bool]:
        """Restore pages into the host pool, page i at host_indices[i * page_size]; which of them are there now."""
        pool = self._pool
        return self._ready().get(_digests(keys), pool.page_tokens, pool.table(host_indices, len(keys)), pool.at)

    @missing(lambda keys: [False] * len(keys))
    def batch_set_v1(self, keys: List[str], host_indices: Any, extra_info: Any = None) -> List[bool]:
        """Store pages of the host pool; on return they are on disk."""
        pool, before = self._pool, getattr(extra_info, "prefix_keys", None)
        first = None if before is None else len(before) * pool.page_tokens
        self._ready().put(_digests(keys), pool.page_tokens, pool.table(host_indices, len(keys)), pool.at, first)
        return [True] * len(keys)

    @missing(lambda _: PoolTransferResult.empty())
    def batch_exists_v2(self, keys: List[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """A model with other state beside KV (Mamba, sliding windows, an indexer): its prefixes are not stored."""
        if pool_transfers:
            raise ValueError(f"pools beside KV are not stored: {', '.join(str(t.name) for t in pool_transfers)}")
        return PoolTransferResult(self.batch_exists(keys, extra_info), {})

    @missing(lambda transfers: {t.name: [False] * len(t.keys or ()) for t in transfers})
    def batch_get_v2(self, transfers: List[Any], extra_info: Any = None) -> Dict[str, List[bool]]:
        raise ValueError("pools beside KV are not stored")

    @missing(lambda transfers: {t.name: [False] * len(t.keys or ()) for t in transfers})
    def batch_set_v2(self, transfers: List[Any], extra_info: Any = None) -> Dict[str, List[bool]]:
        raise ValueError("pools beside KV are not stored")

    # --- One page in a tensor of its own: the older interface, without interface_v1 ---

    @missing(lambda _: False)
    def exists(self, key: str) -> bool:
        return self._ready().leading(_digests([key])) == 1

    @missing(lambda _: None)
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """target_location, filled; None: a miss."""
        done = self._ready().get(_digests([key]), self._pool.page_tokens, [0], self._pool.of_page(target_location))
        return target_location if done == [True] else None

    def batch_get(self, keys: List[str], target_locations: Any = None, target_sizes: Any = None) -> List[Any]:
        return [self.get(key, target) for key, target in zip(keys, target_locations or [None] * len(keys))]

    @missing(lambda _: False)
    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        self._ready().put(_digests([key]), self._pool.page_tokens, [0], self._pool.of_page(value))
        return True

    def batch_set(self, keys: List[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None) -> bool:
        return all([self.set(key, value) for key, value in zip(keys, values or [])])

    def _ready(self) -> PageStore:
        if self._pages is None:
            raise ValueError("no host pool was registered")
        return self._pages


def _digests(keys: Sequence[str]) -> List[bytes]:
    return [bytes.fromhex(key) for key in keys]


class _Pool:
    """SGLang's host memory for pages, as planes."""

    def __init__(self, host: Any) -> None:
        self.page_tokens, self.layers = int(host.page_size), int(host.layer_num)
        check_page_tokens("xkv.sglang", self.page_tokens)
        axes, mla = _LAYOUTS.get(str(host.layout)), hasattr(host, "kv_lora_rank")
        if axes is None or (mla and host.layout == "page_head"):
            raise ValueError(f"xkv.sglang: the host layout {host.layout} is not supported; take page_first")
        try:
            array, self.dtype = as_array(host.kv_buffer)
        except TypeError as error:
            raise ValueError(f"xkv.sglang: the cache has {error}: fp8 and other quantized caches are not supported") from None
        if mla:
            rope_dims = int(host.qk_rope_head_dim)
            kinds, heads, dims = ("latent", "K-rope"), 1, (int(host.kv_lora_rank), rope_dims)
            axes = axes.replace("K", "").replace("D", "C")
        else:
            kinds, heads, dims = ("K", "V"), int(host.head_num), (int(host.head_dim), int(host.head_dim))
            if int(getattr(host, "v_head_dim", dims[0])) != dims[0]:
                raise ValueError("xkv.sglang: K and V of different widths are not supported")
        self.planes = [Plane(layer, kind, heads, width, self.dtype) for layer in range(self.layers)
                       for kind, width in zip(kinds, dims)]
        sizes = {"K": 2, "L": self.layers, "N": self.page_tokens, "H": heads, "D": dims[0], "C": sum(dims)}
        self._axes, self._kinds, self._sizes = axes, kinds, sizes
        self._buffer = self._shaped(array)

    def _shaped(self, array: Array) -> Array:
        """An axis for each letter; SGLang has pages and their slots in one axis where they follow each other."""
        elements = 1
        for letter in self._axes.replace("B", ""):
            elements *= self._sizes[letter]
        if array.size % elements:
            raise ValueError(f"xkv.sglang: a buffer of shape {array.shape} is not {self._axes} with {self._sizes}")
        shaped = array.view()
        shaped.shape = tuple(self._sizes.get(letter, array.size // elements) for letter in self._axes)  # never a copy
        return shaped

    def at(self, table: Sequence[int]) -> List[Pages]:
        return [Pages(self._buffer, self._axes, table, self._kinds)]

    def of_page(self, tensor: Any) -> At:
        """The same for one page in a flat tensor, in the pool's layout."""
        page = self._shaped(as_array(tensor)[0])
        return lambda table: [Pages(page, self._axes, table, self._kinds)]

    def table(self, host_indices: Any, pages: int) -> List[int]:
        """Places of pages in the pool, whose slots host_indices are: [pages * page_tokens]."""
        slots = [int(slot) for slot in host_indices[::self.page_tokens]]
        if len(host_indices) != pages * self.page_tokens or any(slot % self.page_tokens for slot in slots):
            raise ValueError(f"{len(host_indices)} slots for {pages} pages of {self.page_tokens}, or not at pages' beginnings")
        return [slot // self.page_tokens for slot in slots]
