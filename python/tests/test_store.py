"""The store and the hook. Keys and ids are the vectors of spec/store.md."""
import threading

import numpy as np
import pytest
from conftest import ENGINE_FILE, layers

import xkv

OTHER = dict(settings="kv=f16 ctx=4096", lora="adapter-1", salt=b"secret")


def test_namespaces():
    assert xkv.Namespace().id.hex() == "a17c4e0667f236cc2deef5d2053b8aab87415c5e4364bacbba5fb629a1382344"
    other = xkv.Namespace(bytes(range(16)), **OTHER)
    assert other.id.hex() == "3447ebce95628b1ffd7bcdbb00f217d78f41d3aaa6aa45ed794b701f9dbc6c4d"
    assert other == xkv.Namespace(bytes(range(16)), **OTHER) != xkv.Namespace()
    with pytest.raises(ValueError, match="fingerprint"):
        xkv.Namespace(b"short")


def test_chains():
    prompt = [1, 2, 3, 4, 5, 6, 7, 128000, 9]
    keys = xkv.native_chain(xkv.Namespace(), prompt, 4)
    assert [key.tokens for key in keys] == [4, 8, 9]
    assert keys[2].key.hex() == "381d8cdf818ccee3ff3ce979cb8a94227505abfd2c097b15978db6c5244f3af4"
    media = xkv.Prompt([1, 2, 3, 4], [xkv.Media(2, b"cat")])
    assert xkv.native_chain(xkv.Namespace(), media, 4)[0].key.hex().startswith("3ba8d8e53dbce59d")
    assert xkv.sglang_chain(range(1, 9), 4)[1].key.hex().startswith("4ebfa8a1f3c34151")
    assert xkv.vllm_chain(prompt[:8], 4, "0")[1].key.hex().startswith("af7f35b3384169a7")


def test_put_and_match(store, namespace, cache, tokens, lossless):
    put = store.put(namespace, lossless)
    assert (put.tokens, put.existed, put.pack) == (160, False, None)
    assert store.put(namespace, lossless).existed
    longer = np.concatenate([tokens, [1, 2, 3]])
    with store.match(namespace, longer) as match:
        assert match and (match.reason, match.tokens, match.id) == ("found", 160, put.id)
        assert bytes(match.restore()) == ENGINE_FILE.read_bytes()
    assert not match
    changed = tokens.copy()
    changed[100] += 1
    with store.match(namespace, changed) as match:
        assert match.tokens == 100
        assert xkv.Cache.open(match.restore()).geometry.token_ids.tolist() == tokens[:100].tolist()
        assert match.read(tokens=slice(90, 100))[0].shape == (10, 3, 64)
        with pytest.raises(ValueError, match="tokens"):
            match.read(tokens=101)  # of another prompt
    short = store.match(namespace, changed, min_tokens=101)
    assert not short and short.reason == "short"
    with pytest.raises(ValueError, match="short"):
        short.restore()
    assert store.peek(namespace, tokens).tokens == 160
    for other in (xkv.Namespace(), xkv.Namespace(cache.model, settings="test", salt=b"x")):
        assert store.match(other, tokens).reason == "none" and store.ls(other) == []
    stats = store.stat()
    assert (stats.entries, stats.hits, stats.misses) == (1, 2, 3)


def test_put_cache_with_a_dictionary(store, namespace, cache, dictionary, dictionary_bytes, tokens):
    with pytest.raises(xkv.errors.MismatchError, match="dictionary"):
        store.put_cache(namespace, cache, dictionary=dictionary, quality=40)
    assert store.put_dictionary(dictionary_bytes) == dictionary.info.id
    put = store.put_cache(namespace, cache, dictionary=dictionary, quality=40)
    assert put.pack is not None and put.pack.profile == "dict" and put.bytes < 600000
    with store.match(namespace, tokens) as match:
        assert match.info.needs_dict and len(match.restore()) == ENGINE_FILE.stat().st_size


def test_prompts_that_go_on_share(store, namespace, cache, lossless, tokens):
    planes = xkv.open(lossless).read()
    pairs = [(planes[2 * i], planes[2 * i + 1]) for i in range(30)]

    def part(n):
        return xkv.Planes.of_layers([tuple(a[:n] for a in pair) for pair in pairs], model=cache.model,
                                    token_ids=tokens[:n])
    first = store.put_cache(namespace, part(100), chunk_tokens=32)
    second = store.put_cache(namespace, part(160), chunk_tokens=32)
    assert (second.parent, second.base_tokens) == (first.id, 96)
    with store.match(namespace, tokens) as match:
        assert match.tokens == 160
        assert all(np.array_equal(a, b) for a, b in zip(match.read(), planes))
    assert [item.children for item in store.ls(namespace)] == [1, 0]
    assert store.put_cache(namespace, part(130), whole=True).parent == 0


def test_keeping(store, namespace, lossless, tokens, tmp_path):
    put = store.put(namespace, lossless, pin=True, keys=[xkv.PageKey(bytes(32), 64), xkv.PageKey(b"1" * 32, 128)])
    assert store.match_keys(namespace, [bytes(32), b"1" * 32, b"2" * 32]).keys == 2
    (item,) = store.ls(namespace)
    assert item.id == put.id and item.pinned and item.bytes == put.bytes and item.expires == 0
    assert store.set_cap(1000).evicted == 0, "it is pinned"
    store.pin(namespace, put.id, False)
    exported = store.export(namespace, put.id)
    store.export_file(namespace, put.id, tmp_path / "one.xkvx")
    assert (tmp_path / "one.xkvx").read_bytes() == exported
    assert store.verify(decode=True).sound
    assert store.set_cap(1000).evicted == 1 and store.ls(namespace) == []
    store.set_cap(0)
    assert store.import_(exported).tokens == 160
    with store.get(namespace, store.ls(namespace)[0].id) as match:
        assert match.tokens == 160
    with pytest.raises(LookupError):
        store.get(namespace, 999)
    assert store.rm_all(namespace) == 1
    with pytest.raises(xkv.errors.NotFoundError):
        store.rm(namespace, put.id)
    assert store.gc().expired == 0


def test_damage_is_a_miss(store, namespace, lossless, tokens):
    put = store.put(namespace, lossless)
    (blob,) = (store.path / "blobs").iterdir()
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    with store.match(namespace, tokens) as match:
        with pytest.raises(xkv.errors.DataError):
            match.restore()
    assert store.match(namespace, tokens).reason in ("none", "corrupt")
    assert store.stat().quarantined == 1 and store.ls(namespace) == [] and put.id


def test_folders(tmp_path, namespace, lossless):
    key = bytes(range(32))
    with xkv.Store.init(tmp_path / "s", key=key, cap=10 << 20, block_tokens=64) as store:
        store.put(namespace, lossless)
        with pytest.raises(ValueError, match="already open"):
            xkv.Store.open(tmp_path / "s", key=key)
        assert (store.stat().byte_cap, store.stat().block_tokens) == (10 << 20, 64)
    with pytest.raises(FileExistsError):
        xkv.Store.init(tmp_path / "s")
    with pytest.raises(xkv.XkvError):
        xkv.Store.open(tmp_path / "s")
    with pytest.raises(ValueError, match="32"):
        xkv.Store.open(tmp_path / "s", key=b"short")
    assert xkv.Store.repair(tmp_path / "s", key=key).entries == 1
    with xkv.Store.open(tmp_path / "s", key=key, access="read-only") as store:
        assert store.stat().read_only
        with pytest.raises(xkv.XkvError):
            store.put(namespace, lossless)
    with pytest.raises(ValueError, match="closed"):
        store.stat()
    with pytest.raises(FileNotFoundError):
        xkv.Store.open(tmp_path / "none")


def test_a_remote_is_checked(store):
    with pytest.raises(xkv.XkvError):
        store.attach_remote("ftp://host/x")
    with pytest.raises(ValueError):
        store.push()


def test_closing_a_store_closes_what_it_found(tmp_path, namespace, lossless, tokens):
    store = xkv.Store.init(tmp_path / "s")
    store.put(namespace, lossless)
    match, hook = store.match(namespace, tokens), xkv.Hook(store)
    loaded = hook.match(namespace, tokens)
    store.close()
    assert not match and not loaded and hook.closed
    xkv.Store.open(tmp_path / "s").close()


# --- The hook ---

def test_hook(store, namespace, lossless, cache, tokens):
    planes = xkv.open(lossless).read()
    with xkv.Hook(store) as hook:
        saved = hook.save(namespace, tokens, cache.geometry, planes)
        assert saved == xkv.Saved("queued", 1)
        hook.flush(60)
        assert hook.save(namespace, tokens, cache.geometry, planes).outcome == "stored"
        with hook.match(namespace, tokens) as match:
            assert (match.tokens, match.entry_tokens) == (159, 160)  # the last one is computed
            out = [np.zeros_like(plane) for plane in planes]
            announced = []
            match.load(cache.geometry, out, on_group=lambda group, layers: announced.append(layers))
            assert announced[-1] == 30 and announced == sorted(announced)
            assert all(np.array_equal(a[:159], b[:159]) and not a[159].any() for a, b in zip(out, planes))
            with pytest.raises(ValueError):
                match.load(cache.geometry, out, tokens=160)
            with pytest.raises(xkv.errors.MismatchError):
                other = xkv.Geometry(cache.geometry.planes[:-2], cache.geometry.ropes, cache.geometry.positions)
                match.load(other, out[:-2])
        assert hook.match(namespace, tokens, page_tokens=64).tokens == 128
        assert hook.match(namespace, tokens, seconds_per_token=1e-12).reason == "declined"
        assert hook.match(namespace, [5, 6]).reason == "none"
        counters = hook.counters
        assert (counters.saves_stored, counters.saves_known, counters.loads_ok, counters.loads_refused) == (1, 1, 1, 1)
        assert (counters.matches_found, counters.matches_declined, counters.misses_none) == (2, 1, 1)
        assert hook.cancel() == 0


def test_hook_saves_from_many_threads(store, namespace):
    rng = np.random.default_rng(2)
    source = layers(rng, 2, 40, 1, 8)
    planes = xkv.Planes.of_layers(source)
    arrays = [a for pair in source for a in pair]
    with xkv.Hook(store, save_threads=2) as hook:
        def save(n):
            for i in range(5):
                hook.save(namespace, [n, i, *range(38)], planes.geometry, arrays)
        threads = [threading.Thread(target=save, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hook.flush()
        assert hook.counters.saves_stored == 20
    assert len(store.ls(namespace)) == 20
