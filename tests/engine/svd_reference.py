"""The svd profile straight from its definition (Chang et al., arXiv 2503.18893): per prompt, contiguous layers
concatenated on the feature axis, K without its rotation, truncated SVD, factors rounded to 16 bits. An oracle for the
C codec."""
import numpy as np


def rotate(rows, positions, geometry, direction):
    """RoPE (Su et al., arXiv 2104.09864) of rows [tokens, heads * head_dim]; direction -1 undoes it."""
    x = rows.astype(np.float64).reshape(len(rows), -1, geometry.head_dim)
    n_rot = geometry.n_rot
    frequency = geometry.rope_base ** (-np.arange(0, n_rot, 2) / n_rot)
    angle = direction * np.outer(positions, frequency)[:, None, :]
    if geometry.interleaved:
        first, second = slice(0, n_rot, 2), slice(1, n_rot, 2)
    else:
        first, second = slice(0, n_rot // 2), slice(n_rot // 2, n_rot)
    out = x.copy()
    out[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    out[..., second] = x[..., first] * np.sin(angle) + x[..., second] * np.cos(angle)
    return out.reshape(rows.shape)


def groups(layer_count, size):
    return [range(start, min(start + size, layer_count)) for start in range(0, layer_count, size)]


def low_rank(planes, size, rank):
    """Truncated SVD of each group of `size` layers -> (planes, bytes of the factors). A smaller last group gets its
    share of the rank, rounded down."""
    out, total = [], 0
    for layers in groups(len(planes), size):
        group = np.concatenate([planes[i] for i in layers], axis=1)
        components = np.linalg.svd(group, full_matrices=False)[2][:rank * len(layers) // size]
        coefficients = (group @ components.T).astype(np.float16)
        components = components.astype(np.float16)
        total += coefficients.nbytes + components.nbytes
        product = coefficients.astype(np.float64) @ components.astype(np.float64)
        out += np.split(product, len(layers), axis=1)
    return out, total


def compress(file, geometry, size, rank_k, rank_v):
    """Replace the planes of a sequence file by their approximation; bytes of the factors."""
    keys = [rotate(k.get(), file.positions, geometry, -1) for k in file.K]
    values = [v.get().astype(np.float64) for v in file.V]
    keys, key_bytes = low_rank(keys, size, rank_k)
    values, value_bytes = low_rank(values, size, rank_v)
    for plane, rows in zip(file.K, keys):
        plane.set(rotate(rows, file.positions, geometry, +1))
    for plane, rows in zip(file.V, values):
        plane.set(rows)
    return key_bytes + value_bytes


def group_errors(original, other, size):
    """Relative error of each group of K, then of V. Rotation keeps lengths, so that it need not be undone."""
    errors = []
    for kind in ("K", "V"):
        for layers in groups(len(original.K), size):
            a, b = (np.concatenate([getattr(file, kind)[i].get() for i in layers], axis=1).astype(np.float64)
                    for file in (original, other))
            errors.append(float(np.linalg.norm(a - b) / np.linalg.norm(a)))
    return np.array(errors)
