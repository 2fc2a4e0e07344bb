"""xkv.llama without an engine: what is handed over and taken, misses and their reasons."""
import importlib.util
import re
import shutil
import struct

import fake_llama_cpp
import numpy as np
import pytest
from conftest import ENGINE_FILE, GGUF, REPOSITORY

fake_llama_cpp.install()

import xkv  # noqa: E402
import xkv.llama  # noqa: E402
from xkv.llama import state  # noqa: E402

IMAGE = ENGINE_FILE.read_bytes()
MEMORY = IMAGE[12 + 4 * 160:]


def holding(tokens, **settings):
    """A Llama that has computed the tokens of the genuine cache."""
    llama = fake_llama_cpp.Llama(GGUF, MEMORY, **settings)
    llama.input_ids[:160], llama.n_tokens = tokens, 160
    return llama


@pytest.mark.parametrize("with_prefix", [True, False])
def test_sequences(tokens, with_prefix):
    context = fake_llama_cpp.Context(MEMORY, with_prefix)
    assert bytes(state.save_sequence(context, tokens.tolist())) == IMAGE
    empty = fake_llama_cpp.Context(with_prefix=with_prefix)
    state.load_sequence(empty, bytearray(IMAGE))
    assert empty.state == MEMORY
    empty.refuse = True
    with pytest.raises(xkv.llama.EngineError, match="refuses"):
        state.load_sequence(empty, bytearray(IMAGE))
    assert empty.state != b"half a sequence", "what a failed load leaves is removed"
    with pytest.raises(xkv.llama.EngineError, match="version 9"):
        state.load_sequence(empty, bytearray(IMAGE[:4] + struct.pack("<I", 9) + IMAGE[8:]))


def test_contexts(tokens):
    whole = struct.pack("<I", 5) + b"llama" + MEMORY
    assert state.sequence_of_context(whole, tokens.tolist()) == IMAGE
    assert state.context_of_sequence(IMAGE, "llama") == whole
    with pytest.raises(xkv.llama.EngineError):
        state.sequence_of_context(struct.pack("<I", 1000) + b"llama", [1])


def test_save_and_restore(store, tokens):
    put = xkv.llama.Prefixes(holding(tokens), store).save(prefill_seconds=3.2)
    assert put.tokens == 160
    llama = fake_llama_cpp.Llama(GGUF)
    prompt = [*tokens.tolist()[:100], 7, 8, 9]
    restored = xkv.llama.Prefixes(llama, store).restore(prompt)
    assert restored and (restored.tokens, restored.reason, restored.bytes) == (100, "found", put.bytes)
    assert restored.replaced_seconds == pytest.approx(2.0)
    assert llama.n_tokens == 100 and llama.input_ids[:100].tolist() == prompt[:100]
    expected = xkv.open(xkv.pack(xkv.Cache.open(ENGINE_FILE), profile="lossless")).restore(100)
    assert llama.ctx.state == bytes(expected[12 + 400:])


def test_what_the_engine_holds_stays(store, tokens):
    llama = holding(tokens)
    prefixes = xkv.llama.Prefixes(llama, store)
    prefixes.save()
    restored = prefixes.restore(tokens.tolist())
    assert not restored and "holds as much" in restored.reason and llama.n_tokens == 160 and llama.ctx.state == MEMORY


def test_one_token_is_left_to_compute(store, tokens):
    xkv.llama.Prefixes(holding(tokens), store).save()
    assert xkv.llama.Prefixes(fake_llama_cpp.Llama(GGUF), store).restore(tokens.tolist()).tokens == 159
    assert xkv.llama.Prefixes(fake_llama_cpp.Llama(GGUF, n_ctx=50), store).restore(tokens.tolist()).tokens == 49


@pytest.mark.parametrize("settings, reason", [
    (dict(flash_attn_type=0), "flash on instead of off"), (dict(type_k=8, type_v=8), "k f16 instead of q8_0"),
    (dict(rope_freq_base=20000.0), "none of the 1 stored entries"), (dict(swa_full=True), "swa window instead of full")])
def test_other_settings(store, tokens, settings, reason):
    xkv.llama.Prefixes(holding(tokens), store).save()
    llama = fake_llama_cpp.Llama(GGUF, **settings)
    before = llama.ctx.state
    restored = xkv.llama.Prefixes(llama, store).restore(tokens.tolist())
    assert not restored and restored.tokens == 0 and llama.n_tokens == 0 and llama.ctx.state == before
    assert re.search(reason, restored.reason)


def test_other_models(store, tokens, tmp_path):
    """Another header, or the same header before other weights."""
    xkv.llama.Prefixes(holding(tokens), store).save()
    tuned = tmp_path / "tuned.gguf"
    tuned.write_bytes(GGUF.read_bytes() + b"other weights")
    for path in (tuned,):
        restored = xkv.llama.Prefixes(fake_llama_cpp.Llama(path), store).restore(tokens.tolist())
        assert "was made by this model" in restored.reason
    adapted = fake_llama_cpp.Llama(GGUF)
    adapted.lora_path = str(tuned)
    assert not xkv.llama.Prefixes(adapted, store).restore(tokens.tolist())
    assert not xkv.llama.Prefixes(fake_llama_cpp.Llama(GGUF), store, salt=b"tenant").restore(tokens.tolist())


def test_reasons_of_misses(store, tokens):
    prefixes = xkv.llama.Prefixes(fake_llama_cpp.Llama(GGUF), store)
    assert prefixes.restore(tokens.tolist()).reason == "the store is empty"
    xkv.llama.Prefixes(holding(tokens), store).save()
    assert prefixes.restore([1] * 50).reason == "no stored prompt begins like this one"


def test_a_damaged_entry_is_a_miss(store, tokens):
    xkv.llama.Prefixes(holding(tokens), store).save()
    (blob,) = (store.path / "blobs").iterdir()
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    llama = fake_llama_cpp.Llama(GGUF)
    restored = xkv.llama.Prefixes(llama, store).restore(tokens.tolist())
    assert not restored and "not usable" in restored.reason and llama.n_tokens == 0
    assert store.stat().quarantined == 1


def test_an_engine_that_refuses(store, tokens):
    xkv.llama.Prefixes(holding(tokens), store).save()
    llama = fake_llama_cpp.Llama(GGUF)
    llama.ctx.refuse = True
    restored = xkv.llama.Prefixes(llama, store).restore(tokens.tolist())
    assert not restored and "refuses" in restored.reason and llama.n_tokens == 0


# --- Models with sliding windows ---

WINDOWED, WITHIN = (REPOSITORY / "tests" / "golden" / f"{name}-windows.ggsq" for name in ("scalar", "svdq"))


@pytest.fixture
def windows_model(tmp_path):
    """That of the golden files: one layer of two has a window."""
    spec = importlib.util.spec_from_file_location("golden_make", REPOSITORY / "tests" / "golden" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.write_gguf(tmp_path / "windows.gguf", "gemma3", make.HEAD_DIM, base=make.FULL_BASE,
                    **{"attention.sliding_window": 64, "attention.sliding_window_pattern": 2})
    return tmp_path / "windows.gguf"


def sequence_file(path):
    """(token ids, memory state)"""
    data = path.read_bytes()
    (count,) = struct.unpack_from("<I", data, 8)
    return np.frombuffer(data, np.int32, count, 12).tolist(), data[12 + 4 * count:]


def test_a_window_is_restored_as_a_whole(store, windows_model):
    """Of 100 tokens the window holds the last 64: what it takes to go on, or to compute the last token again."""
    ids, memory = sequence_file(WINDOWED)
    llama = fake_llama_cpp.Llama(windows_model, memory)
    llama.input_ids[:100], llama.n_tokens = ids, 100
    xkv.llama.Prefixes(llama, store).save()
    for prompt, tokens in ((ids, 99), ([*ids, 7], 100), ([*ids, 7, 8], 100)):
        empty = fake_llama_cpp.Llama(windows_model)
        restored = xkv.llama.Prefixes(empty, store).restore(prompt)
        assert (restored.tokens, empty.n_tokens, empty.ctx.cut) == (tokens, tokens, tokens)
        assert empty.ctx.state == memory
    for prompt in (ids[:99], [*ids[:98], 7, 8]):
        empty = fake_llama_cpp.Llama(windows_model)
        restored = xkv.llama.Prefixes(empty, store).restore(prompt)
        assert not restored and empty.n_tokens == 0 and "whole prefix" in restored.reason
    full = fake_llama_cpp.Llama(windows_model, swa_full=True)
    assert "swa window instead of full" in xkv.llama.Prefixes(full, store).restore([*ids, 7]).reason


def test_an_engine_that_cannot_cut(store, windows_model):
    ids, memory = sequence_file(WINDOWED)
    llama = fake_llama_cpp.Llama(windows_model, memory)
    llama.input_ids[:100], llama.n_tokens = ids, 100
    xkv.llama.Prefixes(llama, store).save()
    empty = fake_llama_cpp.Llama(windows_model)
    empty.ctx.cuts = False
    restored = xkv.llama.Prefixes(empty, store).restore(ids)
    assert not restored and "cannot cut" in restored.reason and empty.n_tokens == 0 and empty.ctx.state != memory


def test_what_windows_have_left_behind_is_kept(store, windows_model):
    """With swa_full the engine has all tokens in all layers, and says so of the whole context only."""
    ids, memory = sequence_file(WITHIN)
    llama = fake_llama_cpp.Llama(windows_model, b"what the window reaches", swa_full=True)
    llama.ctx.whole = memory
    llama.input_ids[:50], llama.n_tokens = ids, 50
    assert xkv.llama.Prefixes(llama, store).save().tokens == 50
    empty = fake_llama_cpp.Llama(windows_model, swa_full=True)
    assert xkv.llama.Prefixes(empty, store).restore([*ids[:30], 7, 8]).tokens == 30
    model = xkv.Model.from_gguf(windows_model)
    lossless = xkv.pack(xkv.Cache.open(WITHIN, model), profile="lossless")
    assert empty.ctx.state == bytes(xkv.open(lossless).restore(30)[12 + 4 * 30:])


@pytest.mark.parametrize("background", [False, True])
def test_llama_cache(store, tokens, background):
    """The interface of BaseLlamaCache, as Llama calls it."""
    llama = holding(tokens)
    cache = xkv.llama.LlamaCache(llama, store, background=background)
    assert cache, "Llama asks whether there is one by its truth"
    assert tokens.tolist() not in cache
    with pytest.raises(KeyError, match="empty"):
        cache[tokens.tolist()]
    saved = fake_llama_cpp.LlamaState(llama.input_ids.copy(), np.zeros((1, 100)), 160,
                                      struct.pack("<I", 5) + b"llama" + MEMORY, 0, 1)
    cache[tokens.tolist()] = saved
    cache.flush()
    assert tokens.tolist() in cache and cache.cache_size > 1000 and cache.failures == 0
    got = xkv.llama.LlamaCache(fake_llama_cpp.Llama(GGUF), store)[[*tokens.tolist(), 5]]
    assert (got.n_tokens, got.llama_state) == (160, saved.llama_state)
    assert got.input_ids.shape == (512,) and got.input_ids[:160].tolist() == tokens.tolist() and got.input_ids[160] == -1
    saved.llama_state = b"\xff" * 100
    cache[[1] * 160] = saved
    cache.flush()
    assert cache.failures == 1, "what cannot be stored does not stop the engine"


def test_short_prompts_that_miss_the_target_are_stored(store, tokens):
    llama = fake_llama_cpp.Llama(GGUF, bytes(xkv.open(xkv.pack(xkv.Cache.open(ENGINE_FILE))).restore(20))[12 + 80:])
    put = xkv.llama.Prefixes(llama, store, ratio=500).put(
        state.sequence_header(tokens.tolist()[:20]) + llama.ctx.state, tokens.tolist()[:20])
    assert put.tokens == 20 and put.pack is not None and put.pack.profile == "lossless"


def test_dictionaries_are_put_into_the_store(store, tokens, tmp_path, dictionary_bytes):
    (tmp_path / "d.xkvd").write_bytes(dictionary_bytes)
    put = xkv.llama.Prefixes(holding(tokens), store, dictionary=tmp_path / "d.xkvd", quality=40).save()
    assert put.pack is not None and put.pack.profile == "dict" and store.stat().dictionaries == 1
    llama = fake_llama_cpp.Llama(GGUF)
    assert xkv.llama.Prefixes(llama, store).restore(tokens.tolist()).tokens == 159
    shutil.rmtree(store.path / "blobs")
    (store.path / "blobs").mkdir(mode=0o700)
    assert not xkv.llama.Prefixes(llama, store).restore(tokens.tolist())
