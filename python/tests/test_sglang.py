"""xkv.sglang: what SGLang's cache controller calls, in its order, on its host pool."""
import importlib
import threading
import types

import fake_engines
import numpy as np
import pytest
from fake_engines import ROPE, genuine

fake_engines.install("sglang")

from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
)

import xkv  # noqa: E402
import xkv.sglang  # noqa: E402

PAGE, PAGES = 32, 12  # of the pool
# Axes of the host pool's buffer by layout, and where (kind, layer, token of the pool, head, dim) lies in it.
LAYOUTS = {
    "layer_first": (lambda n, layers: (2, layers, n, 3, 64), lambda b, k, layer: b[k, layer]),
    "page_first": (lambda n, layers: (2, n, layers, 3, 64), lambda b, k, layer: b[k, :, layer]),
    "page_first_direct": (lambda n, layers: (2, n // PAGE, layers, PAGE, 3, 64),
                          lambda b, k, layer: b[k, :, layer].reshape(-1, 3, 64)),
    "page_head": (lambda n, layers: (2, n // PAGE, 3, PAGE, layers, 64),
                  lambda b, k, layer: np.moveaxis(b[k, ..., layer, :], 1, 2).reshape(-1, 3, 64)),
}


def pool_of(layout, layers, pages=PAGES):
    """A host pool, as far as the adapter looks at it, and its memory."""
    buffer = np.zeros(LAYOUTS[layout][0](pages * PAGE, layers), np.float16)
    return types.SimpleNamespace(layout=layout, page_size=PAGE, layer_num=layers, head_num=3, head_dim=64, v_head_dim=64,
                                 kv_buffer=fake_engines.tensor(buffer)), buffer


def rows(layout, buffer, kind, layer):
    """A copy of the rows of all tokens of the pool."""
    return LAYOUTS[layout][1](buffer, kind, layer)


def fill(layout, buffer, pages, cache):
    """Put the cache's pages at these places of the pool."""
    for layer, pair in enumerate(cache):
        for kind, values in enumerate(pair):
            for i, page in enumerate(pages):
                part = values[i * PAGE:(i + 1) * PAGE]
                if layout in ("layer_first", "page_first"):
                    rows(layout, buffer, kind, layer)[page * PAGE:page * PAGE + PAGE] = part
                elif layout == "page_first_direct":
                    buffer[kind, page, layer] = part
                else:
                    buffer[kind, page, :, :, layer] = np.moveaxis(part, 1, 0)


def held(layout, buffer, pages, layer, kind):
    return np.concatenate([rows(layout, buffer, kind, layer)[page * PAGE:page * PAGE + PAGE] for page in pages])


def slots(pages):
    return fake_engines.tensor(np.concatenate([np.arange(page * PAGE, page * PAGE + PAGE) for page in pages]))


def config(folder, rank=0, size=1, **extra):
    options = {"backend_name": "xkv", "module_path": "xkv.sglang", "class_name": "XkvStorage", "interface_v1": 1,
               "store": str(folder), "model": "smollm2", **extra}
    return HiCacheStorageConfig(rank, size, 0, 1, 0, 1, False, False, True, "smollm2", extra_config=options)


@pytest.fixture
def opened(tmp_path):
    """A function that makes backends, and closes them in the end."""
    backends = []

    def make(pool, rank=0, size=1, **extra):
        backend = xkv.sglang.XkvStorage(config(tmp_path / "store", rank, size, **extra), {})
        backend.register_mem_pool_host(pool)
        backends.append(backend)
        return backend
    yield make
    for backend in backends:
        backend.close()


def keys_of(tokens):
    return [key.key.hex() for key in xkv.sglang_chain(tokens[:160], PAGE)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_come_back(opened, raw, tokens, layout):
    """Stored from some places of the pool, found by their keys, restored to others: bit for bit."""
    cache, keys = genuine(raw), keys_of(tokens)
    pool, buffer = pool_of(layout, len(cache))
    backend = opened(pool)
    fill(layout, buffer, [3, 7, 1, 0, 9], cache)
    assert backend.batch_exists(keys, HiCacheStorageExtraInfo()) == 0
    assert backend.batch_set_v1(keys, slots([3, 7, 1, 0, 9]), HiCacheStorageExtraInfo(prefix_keys=[])) == [True] * 5
    assert backend.batch_exists(keys + ["00" * 32], HiCacheStorageExtraInfo()) == 5
    buffer[:] = 0
    assert backend.batch_get_v1(keys, slots([2, 4, 5, 8, 10]), HiCacheStorageExtraInfo()) == [True] * 5
    for layer, pair in enumerate(cache):
        for kind, values in enumerate(pair):
            assert np.array_equal(held(layout, buffer, [2, 4, 5, 8, 10], layer, kind), values)
    assert not any(held(layout, buffer, [0, 1, 3, 6, 7, 9, 11], 0, 0).ravel()), "other pages were touched"
    assert not backend.failures.counts


def test_any_part_is_found(opened, raw, tokens):
    """Nodes of a radix tree are split and stored in pieces; what is asked for begins and ends anywhere."""
    cache, keys = genuine(raw), keys_of(tokens)
    pool, buffer = pool_of("page_first", len(cache))
    backend = opened(pool, rope=ROPE, pack={"error": 0.05})
    fill("page_first", buffer, range(5), cache)
    assert backend.batch_set_v1(keys[:2], slots([0, 1]), HiCacheStorageExtraInfo(prefix_keys=[])) == [True] * 2
    # The second call has pages that are stored: only the others are, as pages 2 to 4 of the prompt.
    assert backend.batch_set_v1(keys[1:], slots([1, 2, 3, 4]), HiCacheStorageExtraInfo(prefix_keys=keys[:1])) == [True] * 4
    assert backend._shared.store.stat().entries == 2
    buffer[:] = 0
    assert backend.batch_get_v1([keys[1], keys[2], "ff" * 32, keys[4]], slots([6, 7, 8, 9]), None) == [True, True, False, True]
    for page, place in ((1, 6), (2, 7), (4, 9)):
        for kind in range(2):
            errors = [np.linalg.norm(held("page_first", buffer, [place], layer, kind) - pair[kind][page * PAGE:][:PAGE])
                      for layer, pair in enumerate(cache)]
            norms = [np.linalg.norm(pair[kind][page * PAGE:][:PAGE].astype(np.float32)) for pair in cache]
            assert 0 < np.linalg.norm(errors) / np.linalg.norm(norms) < 0.1
    assert not backend.failures.counts


def test_positions_make_entries_smaller(opened, raw, tokens, tmp_path):
    """With the keys of the pages before, K is coded before RoPE."""
    cache, keys = genuine(raw), keys_of(tokens)
    pool, buffer = pool_of("page_first", len(cache))
    fill("page_first", buffer, range(5), cache)
    sizes = []
    for known in (True, False):
        backend = opened(pool, model=f"smollm2 {known}", rope=ROPE, pack={"profile": "svd", "error": 0.1})
        before = backend._shared.store.stat().bytes
        info = HiCacheStorageExtraInfo(prefix_keys=keys[:1] if known else None)
        assert all(backend.batch_set_v1(keys[1:], slots([1, 2, 3, 4]), info))
        sizes.append(backend._shared.store.stat().bytes - before)
    assert sizes[0] < 0.9 * sizes[1]


def test_ranks_models_and_settings_are_apart(opened, raw, tokens):
    keys = keys_of(tokens)
    cache = genuine(raw)
    pool, buffer = pool_of("page_first", len(cache))
    fill("page_first", buffer, range(5), cache)
    first = opened(pool, 0, 2)
    assert all(first.batch_set_v1(keys, slots(range(5)), None))
    assert opened(pool, 0, 2).batch_exists(keys) == 5
    assert opened(pool, 1, 2).batch_exists(keys) == 0
    assert opened(pool, 0, 1).batch_exists(keys) == 0
    assert opened(pool, 0, 2, model="other").batch_exists(keys) == 0
    first.clear()
    assert first.batch_exists(keys) == 0


def test_the_older_interface(opened, raw, tokens):
    """A page in a flat tensor of its own, in the layout of the pool."""
    cache, keys = genuine(raw), keys_of(tokens)
    pool, buffer = pool_of("page_first_direct", len(cache))
    backend = opened(pool)
    fill("page_first_direct", buffer, range(5), cache)
    pages = [fake_engines.tensor(buffer[:, i:i + 1].copy().reshape(-1)) for i in range(5)]
    assert backend.batch_set(keys, pages) is True
    assert backend.exists(keys[4]) and not backend.exists("00" * 32)
    targets = [fake_engines.tensor(np.zeros_like(np.asarray(page))) for page in pages]
    got = backend.batch_get([*keys[:4], "00" * 32], targets)
    assert got[4] is None
    for page, target in zip(pages[:4], got):
        assert np.array_equal(np.asarray(page), np.asarray(target))


def test_mla(opened):
    """One row of latent and rotated part a token, the same on all ranks."""
    rng = np.random.default_rng(0)
    buffer = np.zeros((PAGES * PAGE, 4, 1, 40), np.float32)
    pool = types.SimpleNamespace(layout="page_first", page_size=PAGE, layer_num=4, kv_lora_rank=32, qk_rope_head_dim=8,
                                 kv_buffer=fake_engines.tensor(buffer))
    values = rng.standard_normal((2 * PAGE, 4, 1, 40)).astype(np.float32)
    buffer[:2 * PAGE] = values
    backend = opened(pool)
    assert all(backend.batch_set_v1(["01" * 32, "02" * 32], slots([0, 1]), None))
    assert all(backend.batch_get_v1(["01" * 32, "02" * 32], slots([5, 4]), None))
    assert np.array_equal(buffer[5 * PAGE:6 * PAGE], values[:PAGE]) and np.array_equal(buffer[4 * PAGE:5 * PAGE], values[PAGE:])


def test_failures_are_misses(opened, raw, tokens, caplog, tmp_path):
    """Nothing raises into the threads of the controller; each kind is logged once."""
    keys = keys_of(tokens)
    cache = genuine(raw)
    pool, buffer = pool_of("page_first", len(cache))
    fill("page_first", buffer, range(5), cache)
    backend = opened(pool)
    assert all(backend.batch_set_v1(keys, slots(range(5)), None))
    for blob in (tmp_path / "store" / "blobs").iterdir():
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.write_bytes(data)
    for _ in range(3):
        assert backend.batch_get_v1(keys, slots(range(5)), None) == [False] * 5
    assert backend.batch_exists(keys) == 0, "what is damaged is not found again"
    assert backend.batch_get_v1(["no key"], slots([0]), None) == [False]
    assert backend.batch_set_v1(keys, slots([0]), None) == [False] * 5
    transfer = types.SimpleNamespace(name="mamba", keys=["00"])
    assert backend.batch_exists_v2(keys, [transfer]).kv_hit_pages == 0
    assert backend.batch_get_v2([transfer]) == {"mamba": [False]} == backend.batch_set_v2([transfer])
    backend.batch_exists_v2(keys, [transfer])
    assert sum("pools beside KV" in message and "batch_exists_v2" in message for message in caplog.messages) == 1
    assert backend.failures.counts["batch_exists_v2: ValueError"] == 2


@pytest.mark.parametrize("change, reason", [
    (dict(layout="page_unified"), "page_unified is not supported"),
    (dict(kv_buffer=np.zeros((2, PAGES * PAGE, 4, 3, 64), np.uint8)), "fp8 and other quantized caches"),
    (dict(v_head_dim=32), "different widths"),
    (dict(kv_buffer=np.zeros((2, 7, 4, 3, 64), np.float16)), "is not KBNLHD"),
])
def test_refusals(opened, change, reason):
    pool, _ = pool_of("page_first", 4)
    vars(pool).update({name: fake_engines.tensor(v) if isinstance(v, np.ndarray) else v for name, v in change.items()})
    with pytest.raises(ValueError, match=reason):
        opened(pool)


def test_wrong_options_are_told(tmp_path):
    with pytest.raises(ValueError, match="ratoi: not an option"):
        xkv.sglang.XkvStorage(config(tmp_path / "store", ratoi=8), {})
    with pytest.raises(TypeError, match="unexpected keyword argument 'ratoi'"):
        xkv.sglang.XkvStorage(config(tmp_path / "store", pack={"ratoi": 8}), {})
    sliced = config(tmp_path / "store")
    sliced.attn_cp_size = 2
    with pytest.raises(ValueError, match="context parallel"):
        xkv.sglang.XkvStorage(sliced, {})


def test_threads_load_and_save_at_once(opened, tokens):
    """SGLang's two threads, while a small store evicts."""
    rng = np.random.default_rng(1)
    pool, buffer = pool_of("page_first", 4)
    buffer[:] = rng.standard_normal(buffer.shape).astype(np.float16)
    kept = buffer[:, :4 * PAGE].copy()
    backend = opened(pool, cap=1 << 20)
    stop, wrong = threading.Event(), []

    def save():
        for i in range(40):
            backend.batch_set_v1([f"{i:02x}{page:02x}" * 16 for page in range(4)], slots(range(4)), None)
        stop.set()

    def load():
        while not stop.is_set():
            for i in range(40):
                if all(backend.batch_get_v1([f"{i:02x}{page:02x}" * 16 for page in range(4)], slots([4, 5, 6, 7]), None)):
                    wrong.append(not np.array_equal(buffer[:, 4 * PAGE:8 * PAGE], kept))
    threads = [threading.Thread(target=save), threading.Thread(target=load)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong) and wrong and backend._shared.store.stat().evictions > 0
    assert not backend.failures.counts, backend.failures.counts


def test_readme(opened, raw, tokens, tmp_path):
    """The configuration there, as written but for the folder."""
    (told,) = fake_engines.readme("--hicache-storage-backend-extra-config")
    assert told.pop("hicache_storage_pass_prefix_keys") is True  # SGLang takes it out
    assert told.pop("store") == "/var/cache/xkv"
    backend_class = getattr(importlib.import_module(told["module_path"]), told["class_name"])
    backend = backend_class(config(tmp_path / "store", **told), {})
    cache, keys = genuine(raw), keys_of(tokens)
    pool, buffer = pool_of("page_first", len(cache))
    backend.register_mem_pool_host(pool)
    fill("page_first", buffer, range(5), cache)
    assert all(backend.batch_set_v1(keys, slots(range(5)), HiCacheStorageExtraInfo(prefix_keys=[])))
    assert all(backend.batch_get_v1(keys, slots(range(5, 10)), None))
    errors = [np.linalg.norm(held("page_first", buffer, range(5, 10), layer, kind).astype(np.float32) - pair[kind])
              / np.linalg.norm(pair[kind].astype(np.float32)) for layer, pair in enumerate(cache) for kind in range(2)]
    assert 0 < np.mean(errors) < 0.3
    backend.close()
