"""python -m xkv.calibrate MODEL.gguf --text FILE... -o metric.safetensors [--dictionary FILE.xkvd] - measure what errors of
a model's keys and values cost, and train a dictionary with it.

For every layer l and key/value head g two symmetric matrices [head_dim, head_dim]; an error e of a head's row costs e^T M e:

    k_metric[l, g] = 0.49 / E|x_l|^2  sum_h  scale^2 E[q q^T] trace(W_h Cov(v_g) W_h^T)      e: of a key before RoPE
    v_metric[l, g] =    1 / E|x_l|^2  sum_h  W_h^T W_h                                        e: of a value

over the query heads h that share g. q is the query after RoPE, rotated back to the position of a random earlier key within
the layer's window; W_h is the part of the output projection that belongs to h, and where its result u is normalized before
it is added (Gemma), with that norm's weights and the mean of 1 / rms(u)^2; x_l is the residual stream behind the attention
block. An error of a key changes scores by q^T e, and with them the mix of values: its cost relative to that of a value's
error is an upper estimate, to which 0.49 = 0.7^2 is fitted. The first tokens (sinks) are left out."""
from __future__ import annotations

import argparse
import json
import math
import pathlib
import struct
import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from .cache import Cache
from .dictionary import train_file
from .geometry import Rope
from .llama import engine
from .model import Metric, Model

SINKS = 4
BY_EMBEDDING = (("gemma2", 46), ("gemma3", 62))  # (architecture, layers): scores are scaled by (embedding / heads)^-1/2
KEY_SCALE = 0.7
DRAWS = 2              # earlier positions that each query is rotated back to
QUERY = "Qcur"         # the last tensor of this name in a layer is after RoPE
RESIDUALS = ("ffn_inp", "sa_out", "attn_residual")  # behind the attention block, by architecture
MIXED = "kqv_out"      # values of all heads, before the output projection

Floats = npt.NDArray[np.float64]


class Statistics:
    """Sums over all tokens of all texts."""

    def __init__(self, path: pathlib.Path, seed: int = 0) -> None:
        self.model_file = path
        self.engine, self.model = engine.Model(path), Model.from_gguf(path)
        first = next(layer for layer in self.model.layers if layer.head_dim_k)
        self.layers, self.heads, self.head_dim = len(self.model.layers), self.engine.heads, first.head_dim_k
        self.kv_heads = first.kv_heads
        if any((layer.kv_heads, layer.head_dim_k, layer.head_dim_v) != (self.kv_heads, self.head_dim, self.head_dim)
               for layer in self.model.layers) or self.model.latent_dim:
            raise SystemExit(f"{path}: a metric needs equal layers with keys and values of one width")
        self.outputs = Outputs(path, self.layers, self.heads, self.head_dim)
        square = self.head_dim, self.head_dim
        self.queries: Floats = np.zeros((self.layers, self.heads, *square))
        self.values: Floats = np.zeros((self.layers, self.kv_heads, *square))
        self.value_sums: Floats = np.zeros((self.layers, self.kv_heads, self.head_dim))
        self.residuals: Floats = np.zeros(self.layers)
        self.norm_gains: Floats = np.zeros(self.layers)
        self.rows = np.zeros(self.layers)
        self.tokens = 0
        self._random = np.random.default_rng(seed)
        self._seen: Dict[str, npt.NDArray[np.float32]] = {}

    # --- Running the model ---

    def add(self, tokens: Sequence[int]) -> bytearray:
        """Evaluate one text; the sequence file of its cache."""
        context = engine.Context(self.engine, len(tokens), engine.F16, True, self._keep, (QUERY, MIXED, *RESIDUALS))
        try:
            for start in range(0, len(tokens), engine.BATCH):
                part = tokens[start:start + engine.BATCH]
                self._seen.clear()
                context.logits(part)  # all scores: else the engine skips most rows of the last layer
                for layer in range(self.layers):
                    self._add_layer(layer, start, len(part))
            image = context.image(tokens)
        finally:
            context.close()
        self._add_values(image)
        self.tokens += len(tokens) - SINKS
        return image

    def _keep(self, name: str, values: npt.NDArray[np.float32]) -> None:
        self._seen[name] = values  # of equal names the last one counts: the query after RoPE

    def _add_layer(self, layer: int, start: int, count: int) -> None:
        skip = max(SINKS - start, 0)
        residual = self._named(RESIDUALS, layer).reshape(count, -1)[skip:]
        self.residuals[layer] += np.square(residual, dtype=np.float64).sum()
        self.rows[layer] += len(residual)
        if layer in self.outputs.normed:
            mixed = self._named((MIXED,), layer).reshape(count, -1)[skip:]
            self.norm_gains[layer] += self.outputs.norm_gains(layer, mixed).sum()
        query = self._named((QUERY,), layer).reshape(count, self.heads, self.head_dim)[skip:]
        positions = np.arange(start + skip, start + count)
        reach = np.minimum(positions + 1, self.model.layers[layer].window or count + start)
        rope = self.model.layers[layer].rope
        for _ in range(DRAWS):
            earlier = positions - (self._random.random(len(positions)) * reach).astype(np.int64)
            back = unrotated(query, earlier, self.model.ropes[rope]) if rope is not None else query
            self.queries[layer] += np.einsum("nhd,nhe->hde", back, back, optimize=True) / DRAWS

    def _named(self, names: Tuple[str, ...], layer: int) -> npt.NDArray[np.float32]:
        for name in names:
            if f"{name}-{layer}" in self._seen:
                return self._seen[f"{name}-{layer}"]
        raise SystemExit(f"{self.model_file}: the engine computes no tensor {' or '.join(names)} in layer {layer}; "
                         f"architecture {self.model.architecture} is not known here")

    def _add_values(self, image: bytearray) -> None:
        with Cache.open(image, self.model) as cache:
            for i, plane in enumerate(cache.geometry.planes):
                if plane.kind == "V":
                    rows = cache.plane(i)[SINKS:].astype(np.float64)
                    self.values[plane.layer] += np.einsum("nhd,nhe->hde", rows, rows, optimize=True)
                    self.value_sums[plane.layer] += rows.sum(0)

    # --- The metric ---

    def metric(self) -> Metric:
        """k and v: [layers, kv_heads, head_dim, head_dim]."""
        share = self.heads // self.kv_heads
        energy = self.residuals / self.rows
        scale = self._score_scale() ** 2
        k = np.zeros((self.layers, self.kv_heads, self.head_dim, self.head_dim))
        v = np.zeros_like(k)
        for layer in range(self.layers):
            grams = self.outputs.grams[layer]
            if layer in self.outputs.normed:
                grams = grams * self.norm_gains[layer] / self.rows[layer]
            for g in range(self.kv_heads):
                mean = self.value_sums[layer, g] / self.tokens
                covariance = self.values[layer, g] / self.tokens - np.outer(mean, mean)
                for h in range(g * share, (g + 1) * share):
                    gram = grams[h]
                    query = self.queries[layer, h] / self.tokens
                    k[layer, g] += KEY_SCALE ** 2 * scale * query * np.trace(gram @ covariance) / energy[layer]
                    v[layer, g] += gram / energy[layer]
        return Metric(_symmetric(k), _symmetric(v))

    def _score_scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        from gguf import GGUFReader
        field = GGUFReader(self.model_file).fields.get(f"{self.model.architecture}.attention.scale")
        if field is not None:
            return float(field.contents())
        by_embedding = (self.model.architecture, self.layers) in BY_EMBEDDING
        return 1 / math.sqrt(self.outputs.width / self.heads if by_embedding else self.head_dim)


def _symmetric(blocks: Floats) -> Floats:
    return (blocks + blocks.transpose(0, 1, 3, 2)) / 2


def unrotated(rows: npt.NDArray[Any], positions: npt.NDArray[Any], rope: Rope) -> npt.NDArray[np.float32]:
    """[rows, heads, head_dim] rotated back by their positions. q^T (s R e) = (s R^T q)^T e: the scale stays a factor."""
    out = np.array(rows, np.float32)
    part = out[..., rope.offset:rope.offset + rope.n_rot]
    if rope.style == "interleaved":
        a, b = part[..., 0::2], part[..., 1::2]
    else:
        a, b = part[..., :rope.n_rot // 2], part[..., rope.n_rot // 2:]
    angle = positions[:, None] * np.array(rope.inv_freq)[None]
    c, s = (np.float32(rope.scale) * f(angle)[:, None].astype(np.float32) for f in (np.cos, np.sin))
    a[...], b[...] = a * c + b * s, b * c - a * s
    return out


class Outputs:
    """What leads from the mixed values of a layer's heads to the residual stream."""

    def __init__(self, path: pathlib.Path, layers: int, heads: int, head_dim: int) -> None:
        import gguf
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

        def weights(name: str) -> Optional[npt.NDArray[np.float32]]:
            tensor = tensors.get(f"{name}.weight")
            return None if tensor is None else gguf.dequantize(tensor.data, tensor.tensor_type)
        self.grams: Floats = np.empty((layers, heads, head_dim, head_dim))  # W_h^T W_h, the norm's weights included
        self.normed: Dict[int, npt.NDArray[np.float32]] = {}  # [embedding, heads * head_dim] of layers with such a norm
        for layer in range(layers):
            projection = weights(f"blk.{layer}.attn_output")
            if projection is None:
                raise SystemExit(f"{path}: not all layers have blk.N.attn_output.weight")
            self.width = len(projection)
            # in models without a norm of its own for the feed-forward part, what is named so is that norm
            behind = any(f"blk.{layer}.{name}.weight" in tensors for name in ("ffn_norm", "post_ffw_norm"))
            norm = weights(f"blk.{layer}.post_attention_norm") if behind else None
            if norm is not None:
                self.normed[layer] = projection
                projection = projection * norm[:, None]
            heads_of = projection.reshape(-1, heads, head_dim)
            self.grams[layer] = np.einsum("dha,dhb->hab", heads_of, heads_of, optimize=True)

    def norm_gains(self, layer: int, mixed: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """1 / rms^2 of what the norm behind the projection is given. mixed: [rows, heads * head_dim]."""
        return np.asarray(1 / np.square(mixed @ self.normed[layer].T).mean(1))


def write_metric(metric: Metric, path: pathlib.Path, about: Dict[str, str]) -> None:
    """A safetensors file, written aside and renamed."""
    header: Dict[str, Any] = {"__metadata__": about}
    at = 0
    for name, blocks in (("k_metric", metric.k), ("v_metric", metric.v)):
        header[name] = {"dtype": "F32", "shape": list(blocks.shape), "data_offsets": [at, at + blocks.nbytes]}
        at += blocks.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(struct.pack("<Q", len(text)) + text + metric.k.tobytes() + metric.v.tobytes())
    partial.replace(path)


def calibrate(model_file: pathlib.Path, texts: Sequence[str], tokens: int,
              say: Any = lambda text: None) -> Tuple[Statistics, List[bytearray]]:
    """Statistics, and the caches, of the first `tokens` tokens of every text."""
    statistics, images = Statistics(model_file), []
    for i, text in enumerate(texts):
        ids = statistics.engine.tokenize(text)[:tokens]
        if len(ids) <= 2 * SINKS:
            say(f"text {i + 1}: {len(ids)} tokens are too few, left out")
            continue
        images.append(statistics.add(ids))
        say(f"text {i + 1} of {len(texts)}: {len(ids)} tokens")
    if not images:
        raise SystemExit("no text is long enough")
    return statistics, images


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m xkv.calibrate", description="Measure what errors of a model's cache "
                                     "cost, and train a dictionary with it.")
    parser.add_argument("model", type=pathlib.Path, help="GGUF file")
    parser.add_argument("--text", type=pathlib.Path, nargs="+", required=True, help="texts like those to be packed")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="the metric (.safetensors), for xkv-train --metric")
    parser.add_argument("--dictionary", type=pathlib.Path, help="train on the caches of the texts (.xkvd)")
    parser.add_argument("--tokens", type=int, default=1024, help="of each text, from its start [1024]")
    args = parser.parse_args(arguments)
    if not args.output and not args.dictionary:
        parser.error("-o or --dictionary is needed")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
    statistics, images = calibrate(args.model, [path.read_text(errors="replace") for path in args.text], args.tokens, say)
    metric = statistics.metric()
    if args.output:
        write_metric(metric, args.output, {"model": args.model.name, "tokens": str(statistics.tokens)})
        say(f"{args.output}: {statistics.layers} layers, {statistics.kv_heads} heads, from {statistics.tokens} tokens")
    if args.dictionary:
        caches = [Cache.open(image, statistics.model) for image in images]
        train_file(caches, args.dictionary, metric=metric, model=statistics.model, overwrite=True)
        say(f"{args.dictionary}: {args.dictionary.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
