"""xkv.transformers on tiny random models. Opt-in: runs where torch and transformers are installed."""
import numpy as np
import pytest
from test_package import snippets

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import xkv  # noqa: E402
import xkv.transformers as xt  # noqa: E402

COMMON = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LONG = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "llama3 scaling": lambda: transformers.LlamaConfig(**COMMON, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
    "linear": lambda: transformers.LlamaConfig(**COMMON, rope_scaling=dict(rope_type="linear", factor=2.0)),
    "yarn": lambda: transformers.LlamaConfig(**COMMON, rope_scaling=LONG),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, sliding_window=256, query_pre_attn_scalar=16),
    "partial": lambda: transformers.StableLmConfig(**{**COMMON, "partial_rotary_factor": 0.5}),
}


def made(name, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(MODELS[name]()).to(dtype).eval()


def prompt(length=60, seed=1):
    return torch.randint(3, 200, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def filled(model, ids):
    return model(ids, use_cache=True).past_key_values


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name):
    """Lossless: every tensor comes back, bit for bit."""
    model, ids = made(name), prompt()
    cache = filled(model, ids)
    entry = xkv.open(xkv.pack(xt.planes_of(cache, ids[0].tolist(), xt.rope_of(model)), profile="lossless"))
    assert entry.geometry.token_ids.tolist() == ids[0].tolist()
    again = xt.cache_of(entry, config=model.config)
    for (a, b), (c, d) in zip(xt.layers_of(cache), xt.layers_of(again)):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_static_caches():
    """Padded to a fixed length: the first tokens are taken."""
    model, ids = made("llama"), prompt()
    static = transformers.StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad():
        model(ids, past_key_values=static, use_cache=True)
    a = xt.planes_of(static, ids[0].tolist(), xt.rope_of(model))
    entry = xkv.open(xkv.pack(a, profile="lossless"))
    for got, (keys, values) in zip(xt.layers_of(xt.cache_of(entry)), xt.layers_of(filled(model, ids))):
        assert torch.allclose(got[0], keys, atol=1e-5) and torch.allclose(got[1], values, atol=1e-5)
    assert xt.layers_of(static)[0][0].shape[-2] == 128


@pytest.mark.parametrize("name", MODELS)
def test_rope_is_what_the_model_does(name):
    """The same tokens from position 0 and from position 37: keys of the first layer differ by the rotation alone."""
    model, ids = made(name), prompt(20)
    ropes = xt.rope_of(model)
    assert all(rope is not None for rope in ropes)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        moved = model(ids, position_ids=torch.arange(37, 57)[None], use_cache=True).past_key_values
    entry = xkv.open(xkv.pack(xt.planes_of(cache, ids[0].tolist(), ropes), profile="lossless"))
    keys = entry.read(groups=None, positions=np.arange(37, 57))[0]
    assert np.allclose(keys, xt.layers_of(moved)[0][0][0].transpose(0, 1).numpy(), atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate(store, dtype):
    model, ids = made("llama", dtype), prompt()
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    cache = xt.PrefixCache(model, store)
    assert torch.equal(cache.generate(ids, max_new_tokens=12, do_sample=False), expected)
    assert cache.last.tokens == 0 and cache.last.reason == "none" and cache.last.stored.tokens == 60
    longer = torch.cat([ids, prompt(5, seed=3)], 1)
    other = xt.PrefixCache(model, store)
    got = other.generate(longer, max_new_tokens=12, do_sample=False)
    assert other.last.tokens == 60 and other.last.stored is None
    if dtype == torch.float32:
        assert torch.equal(got, model.generate(longer, max_new_tokens=12, do_sample=False))
    again = other.generate(ids, max_new_tokens=12, do_sample=False)
    assert other.last.tokens == 59 and again.shape == expected.shape


def test_other_weights_do_not_match(store):
    ids = prompt()
    xt.PrefixCache(made("llama"), store).generate(ids, max_new_tokens=2, do_sample=False)
    other = xt.PrefixCache(made("llama", seed=9), store)
    other.generate(ids, max_new_tokens=2, do_sample=False)
    assert other.last.tokens == 0 and other.last.reason == "none"


def test_lossy(store):
    model, ids = made("llama"), prompt(200)
    cache = xt.PrefixCache(model, store, error=0.1)
    cache.generate(ids, max_new_tokens=2, do_sample=False)
    assert cache.last.stored.pack.ratio > 1.2
    restored = cache.restore([*ids[0].tolist(), 5])
    for (a, _), (b, _) in zip(xt.layers_of(filled(model, ids)), xt.layers_of(restored)):
        assert 0 < torch.linalg.norm(a - b) / torch.linalg.norm(a) < 0.4


def test_a_window_that_has_slid_is_not_stored(store):
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Gemma3TextConfig(**COMMON, sliding_window=32, query_pre_attn_scalar=16)).eval()
    cache = xt.PrefixCache(model, store)
    ids = prompt()
    assert cache.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 63
    assert cache.last.stored is None and store.stat().entries == 0


def test_readme(store):
    """The snippet, as written."""
    (code,) = [code for code in snippets() if "transformers" in code]
    names = dict(model=made("llama"), store=store, input_ids=prompt())
    for reused in (0, 59):
        exec(code, names)
        assert names["cache"].last.tokens == reused and names["output"].shape[1] > 60


def test_one_sequence_only(store):
    with pytest.raises(ValueError, match="expected"):
        xt.PrefixCache(made("llama"), store).generate(torch.zeros((2, 5), dtype=torch.long))
