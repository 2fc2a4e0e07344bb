"""xkv.calibrate without an engine: what leads from the values to the residual stream."""
import sys
import types

import fake_llama_cpp
import numpy as np
import pytest

fake_llama_cpp.install()

from xkv.calibrate import Outputs  # noqa: E402

EMBEDDING, HEADS, DIM = 256, 4, 16


@pytest.fixture
def weights(monkeypatch):
    """{name: array} of the model file."""
    tensors = {}

    class Reader:
        def __init__(self, _path):
            self.tensors = [types.SimpleNamespace(name=f"{name}.weight", data=data, tensor_type=0)
                            for name, data in tensors.items()]
    fake = types.ModuleType("gguf")
    fake.GGUFReader, fake.dequantize = Reader, lambda data, _type: data
    monkeypatch.setitem(sys.modules, "gguf", fake)
    return tensors


def outputs():
    return Outputs("model.gguf", 1, HEADS, DIM)


@pytest.fixture
def projection(weights, rng):
    weights["blk.0.attn_output"] = rng.normal(size=(EMBEDDING, HEADS * DIM)).astype(np.float32) * 3
    return weights["blk.0.attn_output"]


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def cost(block, mixed, head, error):
    """Mean squared change of the block's result when the values of a head are off by `error`, by differences."""
    off = mixed.copy()
    off[:, head * DIM:(head + 1) * DIM] += 1e-3 * error
    return np.square(block(off) - block(mixed)).sum(1).mean() / 1e-6


def test_projection(weights, projection, rng):
    mixed, error = rng.normal(size=(50, HEADS * DIM)), rng.normal(size=DIM)
    weights["blk.0.post_attention_norm"] = rng.random(EMBEDDING).astype(np.float32)  # before the feed-forward part
    made = outputs()
    assert not made.normed
    for head in range(HEADS):
        expected = cost(lambda rows: rows @ projection.astype(float).T, mixed, head, error)
        assert error @ made.grams[0, head] @ error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("feed_forward", ["ffn_norm", "post_ffw_norm"])
def test_norm_behind_the_projection(weights, projection, rng, feed_forward):
    """Up to what an error along the result itself would cost, which the norm takes away: one of the 64 directions."""
    norm = weights["blk.0.post_attention_norm"] = rng.random(EMBEDDING).astype(np.float32) + 0.5
    weights[f"blk.0.{feed_forward}"] = np.ones(EMBEDDING, np.float32)
    mixed, error = rng.normal(size=(200, HEADS * DIM)) * 0.2, rng.normal(size=DIM)

    def block(rows):
        u = rows @ projection.astype(float).T
        return norm * u / np.sqrt(np.square(u).mean(1, keepdims=True))
    made = outputs()
    gain = made.norm_gains(0, mixed.astype(np.float32)).mean()
    for head in range(HEADS):
        got = gain * error @ made.grams[0, head] @ error
        assert got == pytest.approx(cost(block, mixed, head, error), rel=0.05)


def test_a_layer_without_projection(weights):
    with pytest.raises(SystemExit, match="attn_output"):
        outputs()
