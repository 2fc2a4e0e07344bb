"""Attention over entries, against softmax(Q K^T) V by numpy over the restored rows."""
import numpy as np
import pytest

import xkv


@pytest.fixture(scope="module")
def entry(cache):
    return xkv.open(xkv.pack(cache, error=0.15))


@pytest.fixture(scope="module")
def rows(entry):
    return entry.read(dtype="f32")


def expected(queries, keys, values, seen, scale):
    """[count, heads, dim] and [count, heads], in f64."""
    keys, values = (np.repeat(a.astype(np.float64), queries.shape[1] // a.shape[1], 1) for a in (keys, values))
    scores = np.where(seen[:, None], scale * np.einsum("qhd,thd->qht", queries.astype(np.float64), keys), -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    lse = np.log(weights.sum(-1)) + top[..., 0]
    return np.einsum("qht,thd->qhd", weights / weights.sum(-1, keepdims=True), values), lse


@pytest.mark.parametrize("hold", ["nothing", "coefficients", "rows"])
@pytest.mark.parametrize("causal, window", [(False, 0), (True, 0), (True, 20)])
def test_attend(entry, rows, hold, causal, window):
    queries = np.random.default_rng(3).standard_normal((5, 9, 64)).astype(np.float32)
    at = np.array([30, 100, 159, 160, 170])
    distance = at[:, None] - np.arange(160)
    seen = (distance >= 0) & (distance < (window or 1000)) if causal else np.ones((5, 160), bool)
    want, want_lse = expected(queries, rows[14], rows[15], seen, 0.125)
    with xkv.Attention(entry, layers=slice(5, 9), hold=hold) as attention:
        assert attention.info.hold == hold and attention.info.layer_count == 4
        output, lse = attention.attend(7, queries, positions=at, causal=causal, window=window)
    assert np.allclose(output, want, atol=5e-3) and np.allclose(lse, want_lse, atol=5e-3)


def test_parts_merge(entry, rows):
    queries = np.random.default_rng(4).standard_normal((9, 3, 64)).astype(np.float32).transpose(1, 0, 2)
    parts = [xkv.Attention(entry, tokens).attend(2, queries) for tokens in (slice(0, 70), slice(70, 160))]
    output, lse = xkv.merge(parts)
    want, want_lse = expected(queries, rows[4], rows[5], np.ones((3, 160), bool), 0.125)
    assert np.allclose(output, want, atol=5e-3) and np.allclose(lse, want_lse, atol=5e-3)


def test_wrong_queries(entry):
    attention = xkv.Attention(entry)
    for queries in (np.zeros((1, 9, 63), np.float32), np.zeros((9, 64), np.float32), np.zeros((1, 9, 64), np.float16)):
        with pytest.raises(ValueError, match="queries"):
            attention.attend(0, queries)
    good = np.zeros((1, 9, 64), np.float32)
    for wrong in (dict(positions=[1, 2]), dict(causal=True), dict(scale=-1.0)):
        with pytest.raises(ValueError):
            attention.attend(0, good, **wrong)
    with pytest.raises(ValueError):
        attention.attend(0, np.zeros((1, 8, 64), np.float32))  # no multiple of 3 heads
    with pytest.raises(ValueError, match="layer 30"):
        attention.attend(30, good)
    with pytest.raises(ValueError, match="hold"):
        xkv.Attention(entry, hold="all")
    with pytest.raises(ValueError, match="states"):
        xkv.merge([])
