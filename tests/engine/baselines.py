"""What xkv is held against: the block formats of engines, grouped SVD with 16-bit factors, and merged neighbouring
layers. Each takes planes [tokens, width] and gives (approximated planes, bytes that they take); K is without RoPE."""
import numpy as np

import svd_reference

BLOCK = 32  # elements that share a scale in q8_0 and q4_0


# --- Blocks ---

def q8_0(rows):
    """Blocks of 32 signed bytes and an f16 scale; (approximation, bytes)."""
    x = rows.astype(np.float32).reshape(-1, BLOCK)
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    codes = x * reciprocal(scale)
    codes = np.trunc(codes + np.copysign(np.float32(0.5), codes))  # halves away from 0, as C rounds
    return (codes * stored(scale)).reshape(rows.shape), x.size + 2 * len(x)


def q4_0(rows):
    """Blocks of 32 codes from -8 to 7 and an f16 scale that makes the largest element -8; (approximation, bytes)."""
    x = rows.astype(np.float32).reshape(-1, BLOCK)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    scale = largest / np.float32(-8)
    codes = np.minimum(np.floor(x * reciprocal(scale) + np.float32(8.5)), 15) - 8
    return (codes * stored(scale)).reshape(rows.shape), x.size // 2 + 2 * len(x)


def reciprocal(scale):
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def stored(scale):
    return scale.astype(np.float16).astype(np.float32)


# --- Grouped SVD: xKV (Chang et al., arXiv 2503.18893); Single SVD is the group of one layer ---

class GroupedSvd:
    """Truncated SVDs, at any ranks, of groups of contiguous layers concatenated on the feature axis: all tokens, no
    mean subtracted, nothing exact, both factors at 16 bits. The decomposition is made once."""

    def __init__(self, planes, size):
        self.size, self.width, self.layers = size, planes[0].shape[1], len(planes)
        self.groups = [decompose(np.concatenate([planes[i] for i in layers], axis=1))
                       for layers in svd_reference.groups(len(planes), size)]

    def share(self, components, rank):
        """Of a smaller last group: in proportion, at least 1."""
        layers = components.shape[1] // self.width
        return min(max(rank * layers // self.size, 1), len(components))

    def size_at(self, rank):
        """Bytes of all factors."""
        return sum(2 * self.share(components, rank) * (len(coefficients) + components.shape[1])
                   for coefficients, components in self.groups)

    def at(self, rank):
        planes = []
        for coefficients, components in self.groups:
            r = self.share(components, rank)
            product = half(coefficients[:, :r]) @ half(components[:r])
            planes += np.split(product, components.shape[1] // self.width, axis=1)
        return planes, self.size_at(rank)


def decompose(x):
    """(coefficients, components), the strongest first: x = coefficients @ components."""
    x = x.astype(np.float64)
    if len(x) >= x.shape[1]:  # of the smaller Gram matrix: exact far below what 16 bits keep
        components = np.linalg.eigh(x.T @ x)[1][:, ::-1].T
        return x @ components.T, components
    energy, rows = np.linalg.eigh(x @ x.T)
    scales = np.sqrt(np.maximum(energy[::-1], energy[-1] * 1e-15))
    rows = rows[:, ::-1]
    return rows * scales, (rows / scales).T @ x


def half(x):
    return x.astype(np.float16).astype(np.float64)


def ranks_at(keys, values, size):
    """The largest ranks, K to V as 1 to 1.5, whose factors take at most `size` bytes; None below rank 1."""
    best = None
    for total in range(3, len(keys.groups[0][1]) + len(values.groups[0][1]) + 1):
        ranks = split_ranks(total)
        if keys.size_at(ranks[0]) + values.size_at(ranks[1]) > size:
            break
        best = ranks
    return best


def split_ranks(total):
    rank_k = max(round(0.4 * total), 1)
    return rank_k, total - rank_k


# --- Spherical merge of neighbouring layers: MiniCache (Liu et al., arXiv 2405.14366) ---

def merge_layers(planes, start, retained, t=0.5):
    """Layers from `start` on are merged in pairs: of each token one direction is kept, interpolated on the sphere, and
    its two magnitudes. The share `retained` of a pair's tokens, those with the largest angles, stays as it is."""
    planes, size = list(planes), 0
    first = len(planes) - (len(planes) - start) // 2 * 2
    for i in range(first, len(planes), 2):
        planes[i], planes[i + 1], pair_size = merge_pair(planes[i], planes[i + 1], retained, t)
        size += pair_size
    return planes, size + sum(2 * plane.size for plane in planes[:first])


def merge_pair(a, b, retained, t):
    """Two layers -> (approximations, bytes): a direction and two magnitudes a merged token, both rows and a 32-bit
    index a retained one, everything else at 16 bits."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    direction, angle = slerp(a, b, t)
    merged = [half(direction) * half(np.linalg.norm(x, axis=1, keepdims=True)) for x in (a, b)]
    count = round(retained * len(a))
    exact = np.argsort(angle)[len(a) - count:]
    for result, x in zip(merged, (a, b)):
        result[exact] = x[exact]
    width = a.shape[1]
    return *merged, 2 * (len(a) - count) * (width + 2) + count * (2 * 2 * width + 4)


def slerp(a, b, t):
    """(unit rows on the arc from a's direction to b's, angles between the two)."""
    unit_a, unit_b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (a, b))
    # of the chord: exact for small angles, where an arc cosine is not
    half_chord = np.clip(np.linalg.norm(unit_a - unit_b, axis=1, keepdims=True) / 2, 0, 1)
    angle = 2 * np.arcsin(half_chord)
    small = np.sin(angle) < 1e-6  # nearly parallel (or opposite, where no arc is the shortest): the straight line
    sine = np.where(small, 1, np.sin(angle))
    weight_a = np.where(small, 1 - t, np.sin((1 - t) * angle) / sine)
    weight_b = np.where(small, t, np.sin(t * angle) / sine)
    return weight_a * unit_a + weight_b * unit_b, angle[:, 0]
