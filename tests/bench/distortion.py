"""What an approximation of a cache loses: relative errors of planes, and the error in a metric."""
import json
import struct
from dataclasses import dataclass

import numpy as np

import svd_reference


# --- Metric ---

class Metric:
    """Blocks M [layers, heads, head_dim, head_dim] for K and V: an error e of a head's row costs e^T M e."""

    def __init__(self, keys, values):
        self.blocks = {"K": keys, "V": values}

    def cost(self, kind, layer, rows):
        """Of each row [tokens, heads * head_dim]."""
        blocks, total = self.blocks[kind][layer], np.zeros(len(rows))
        for block, head in zip(blocks, np.split(rows, len(blocks), axis=1)):
            total += np.einsum("ti,ti->t", head @ block, head)
        return total


def read_metric(path):
    tensors = read_safetensors(path.read_bytes())
    return Metric(tensors["k_metric"], tensors["v_metric"])


def read_safetensors(data):
    """The f32 tensors of a safetensors file."""
    size, = struct.unpack_from("<Q", data)
    tensors = {}
    for name, entry in json.loads(data[8:8 + size]).items():
        if entry.get("dtype") == "F32":
            begin, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(data[8 + size + begin:8 + size + end], "<f4").reshape(entry["shape"])
    return tensors


# --- Caches ---

def unrotated(file, geometry):
    """{"K": planes, "V": planes} of a sequence file, K without RoPE."""
    return {"K": [svd_reference.rotate(k.get(), file.positions, geometry, -1).astype(np.float32) for k in file.K],
            "V": [v.get() for v in file.V]}


class Means:
    """The mean of each plane over the tokens of a dictionary's training caches, their sinks left out."""

    def __init__(self, sinks):
        self.sinks, self.tokens, self.sums = sinks, 0, None

    def add(self, planes):
        sums = {kind: [rows[self.sinks:].sum(axis=0, dtype=np.float64) for rows in planes[kind]] for kind in planes}
        self.tokens += len(planes["K"][0]) - self.sinks
        self.sums = sums if self.sums is None else {
            kind: [a + b for a, b in zip(self.sums[kind], sums[kind])] for kind in sums}

    def of(self, kind, layer):
        return (self.sums[kind][layer] / self.tokens).astype(np.float32)


@dataclass
class Errors:
    metric: float  # sqrt( sum e^T M e / sum (x - mean)^T M (x - mean) ), as error.metric of spec/dictionary.md
    kinds: dict    # of all K and of all V planes: sqrt( sum e^2 / sum x^2 )
    planes: dict   # the same of each plane: {"K": [layers], "V": [layers]}


class Judge:
    """Compares approximations with one cache. Sums are kept for each token, so that any range can be looked at."""

    def __init__(self, planes, metric, means, sinks):
        self.planes, self.metric, self.sinks = planes, metric, sinks
        self.energy = {kind: [squares(x) for x in planes[kind]] for kind in planes}
        self.metric_energy = sum(metric.cost(kind, layer, x - means.of(kind, layer))
                                 for kind in planes for layer, x in enumerate(planes[kind]))

    def compare(self, planes):
        """`planes` as the source's: K without RoPE."""
        found, cost = {kind: [] for kind in planes}, 0
        for kind in planes:
            for layer, (x, y) in enumerate(zip(self.planes[kind], planes[kind], strict=True)):
                found[kind].append(squares(y - x))
                cost = cost + self.metric.cost(kind, layer, y - x)
        return Comparison(self, found, cost)


def squares(rows):
    """Sum of each row's."""
    return np.einsum("ti,ti->t", rows, rows).astype(np.float64)


@dataclass
class Comparison:
    judge: Judge
    squares: dict     # of the errors: {kind: a plane's [tokens] each}
    cost: np.ndarray  # in the metric: [tokens]

    def errors(self, tokens=None):
        """Over the first `tokens` tokens (default: all), the sinks left out, which every profile keeps exact."""
        judged = slice(self.judge.sinks, tokens)
        metric = np.sqrt(self.cost[judged].sum() / self.judge.metric_energy[judged].sum())
        kinds, planes = {}, {}
        for kind in self.squares:
            error, energy = (np.array([x[judged].sum() for x in sums[kind]])
                             for sums in (self.squares, self.judge.energy))
            kinds[kind] = float(np.sqrt(error.sum() / energy.sum()))
            planes[kind] = np.sqrt(error / energy).tolist()
        return Errors(float(metric), kinds, planes)
