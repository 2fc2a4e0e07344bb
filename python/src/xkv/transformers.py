"""Hugging Face transformers: DynamicCache in and out, and generation that reuses stored prefixes.

    cache = xkv.transformers.PrefixCache(model, store, ratio=16)
    output = cache.generate(input_ids, max_new_tokens=64)       # as model.generate(), for one sequence

Keys are cached after RoPE. How the model rotates them is read from its own rotary embedding (default, linear, YaRN, llama3,
partial rotary dims, and dynamic and longrope for prompts no longer than what the model was trained on): then they are coded
before RoPE, which is better by far. Where that is not known, or has changed with the length (dynamic, longrope), they are
coded as they are. Models with multi-head latent attention (DeepSeek) cache the latent and the rotated part of a key; before
transformers 5 they cached keys and values of every head: both are stored as they are cached. Caches that do not hold every
token of every layer (sliding windows that have slid, recurrent states) are not stored."""
from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from transformers import DynamicCache

from ._call import logger
from .cache import Planes
from .dictionary import Dictionary
from .entry import Entry
from .errors import XkvError
from .geometry import Geometry, Plane, Rope, int32_array
from .prompt import Namespace
from .store import Match, Store
from .store_types import PutReport

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .packing import PackSettings

_SAMPLE = 256  # elements at each end of a parameter that tell weights apart
_TORCH_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_DTYPES = {kind: name for name, kind in _TORCH_TYPES.items()}

# Models that rotate pairs of neighbours; all others rotate an element of the first half with one of the second.
_INTERLEAVED = {"cohere", "cohere2", "cohere2_moe", "deepseek_v2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium",
                "llama4_text"}

Layer = Tuple[Any, Any]  # keys and values, [batch, heads, tokens, head_dim]


class UnsupportedCache(ValueError):
    """A cache that cannot be stored: not all tokens of all layers are in it."""


# --- Caches ---

def layers_of(cache: Any) -> List[Layer]:
    """(keys, values) of each layer: of a DynamicCache, a StaticCache, or the older tuple of tuples."""
    if hasattr(cache, "layers"):
        if any(getattr(layer, "keys", None) is None for layer in cache.layers):
            raise UnsupportedCache("a layer without keys: it has another kind of state")
        return [(layer.keys, layer.values) for layer in cache.layers]
    if hasattr(cache, "key_cache"):
        return list(zip(cache.key_cache, cache.value_cache))
    return [(layer[0], layer[1]) for layer in cache]


def planes_of(cache: Any, tokens: Sequence[int], ropes: Sequence[Optional[Rope]] = (), row: int = 0,
              latent: int = 0) -> Planes:
    """The planes of the first len(tokens) tokens of one sequence of a batch (`row`), read where they lie; tensors on a device
    are copied to the host. ropes: as of rope_of(). latent: the model's kv_lora_rank, if it has one.

    UnsupportedCache: a layer has fewer tokens."""
    arrays: List[Any] = []
    planes: List[Plane] = []
    different: List[Rope] = []
    for i, layer in enumerate(layers_of(cache)):
        if any(part.shape[-2] < len(tokens) for part in layer):
            raise UnsupportedCache(f"layer {i} holds {layer[0].shape[-2]} of {len(tokens)} tokens: a window that has slid")
        heads, width = layer[0].shape[-3], layer[0].shape[-1]
        kinds = ("latent", "K-rope") if latent and (heads, width) == (1, latent) else ("K", "V")
        for part, kind in zip(layer, kinds):
            rope = ropes[i] if ropes and kind == "K" else None
            if rope is not None and rope not in different:
                different.append(rope)
            arrays.append(part[row].detach()[:, :len(tokens)].cpu().transpose(0, 1))
            planes.append(Plane(i, kind, part.shape[-3], part.shape[-1], _DTYPES[part.dtype],
                                None if rope is None else different.index(rope)))
    geometry = Geometry(tuple(planes), tuple(different), np.arange(len(tokens), dtype=np.int32), int32_array(tokens, "tokens"))
    return Planes(geometry, arrays)


def cache_of(entry: Union[Entry, Match], tokens: Optional[int] = None, *, config: Any = None, device: Any = None) -> Any:
    """A DynamicCache of the first tokens (None: all) of an entry, for a batch of one. config: the model's."""
    count = tokens or (entry.tokens if isinstance(entry, Match) else entry.geometry.tokens)
    planes = entry.geometry.planes
    tensors = [torch.empty((1, plane.heads, count, plane.head_dim), dtype=_TORCH_TYPES[plane.dtype]) for plane in planes]
    entry.read(tokens=count, out=[tensor[0].transpose(0, 1) for tensor in tensors])
    cache = DynamicCache(config=config) if config is not None else DynamicCache()
    for layer in range(entry.geometry.layers):
        kinds = ("latent", "K-rope") if any(plane.kind == "latent" for plane in planes) else ("K", "V")
        keys, values = (tensors[entry.geometry.index(layer, kind)].to(device) for kind in kinds)
        cache.update(keys, values, layer)
    return cache


# --- RoPE ---

def rope_of(model: Any, tokens: int = 0) -> List[Optional[Rope]]:
    """How keys of each layer are rotated; None: not at all, not known, or by the length of the sequence.

    tokens: of the prompt. Dynamic and longrope frequencies change behind what the model was trained on: for longer prompts,
    and for 0, they are None."""
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    module = next((m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)
    if module is None:
        return [None] * count
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    local = next((m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb_local"), None)
    return [_rope(local if local is not None and kind == "sliding_attention" else module, kind, config, tokens)
            if _rotates(config, layer, kind) else None for layer, kind in enumerate(kinds)]


def _rotates(config: Any, layer: int, kind: str) -> bool:
    """Some models leave the keys of some layers as they are."""
    flags = getattr(config, "no_rope_layers", None)  # named so, and 1 where there is one
    if config.model_type in ("cohere2", "cohere2_moe"):
        return kind == "sliding_attention"
    return bool(flags[layer]) if flags else True


def _rope(module: Any, kind: str, config: Any, tokens: int) -> Optional[Rope]:
    for prefix in (f"{kind}_", ""):  # newer models keep one embedding for each kind of layer in the same module
        frequencies = getattr(module, f"{prefix}inv_freq", None)
        if frequencies is None:
            continue
        types = getattr(module, "rope_type", "default")
        rope_type = types.get(kind, "default") if isinstance(types, dict) else types
        if rope_type in ("dynamic", "longrope"):
            if not 0 < tokens < _trained_length(rope_type, module, config, kind):
                return None
            frequencies = getattr(module, f"{prefix}original_inv_freq", frequencies)
        scale = float(getattr(module, f"{prefix}attention_scaling", getattr(module, "attention_scaling", 1.0)))
        style = "interleaved" if config.model_type in _INTERLEAVED else "half-split"
        # The rotated part of a head of latent attention is its end; where it is cached by itself it is stored exactly.
        offset = config.qk_nope_head_dim if getattr(config, "kv_lora_rank", None) else 0
        return Rope(tuple(frequencies.double().tolist()), style, offset, scale)
    return None


def _trained_length(rope_type: str, module: Any, config: Any, kind: str) -> int:
    """Shorter sequences do not change the frequencies."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    given = given.get(kind, given)
    if rope_type == "longrope":
        return int(given.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return int(getattr(module, "original_max_seq_len", config.max_position_embeddings))


# --- Prefixes ---

def fingerprint_of(model: Any) -> bytes:
    """16 bytes that tell models apart: the configuration, and samples of all weights."""
    digest = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        for part in (flat[:_SAMPLE], flat[-_SAMPLE:]):
            digest.update(part.to(torch.float32).cpu().numpy().tobytes())
    return digest.digest()


@dataclass
class Reuse:
    """What the last generate() reused."""

    tokens: int = 0
    reason: str = ""
    bytes: int = 0
    seconds: float = 0.0
    stored: Optional[PutReport] = None


class PrefixCache:
    """Stored prefixes of one model. `last` tells what the last call reused and stored."""

    def __init__(self, model: Any, store: Store, *, min_tokens: int = 16, settings: str = "", salt: bytes = b"",
                 dictionary: Optional[Dictionary] = None, **options: Unpack[PackSettings]) -> None:
        """settings: whatever else makes caches differ, as adapters. dictionary: to pack with; it must be in the store.
        options: how prompts are packed."""
        self.model, self.store, self.min_tokens = model, store, min_tokens
        self.options: Dict[str, Any] = {**options, "dictionary": dictionary}
        self.latent = int(getattr(model.config.get_text_config(), "kv_lora_rank", None) or 0)
        self.namespace = Namespace(fingerprint_of(model), settings=f"transformers {settings}".rstrip(), salt=salt)
        self.last = Reuse()

    def generate(self, input_ids: Any, *, save: bool = True, **options: Any) -> Any:
        """model.generate(input_ids, **options) for input_ids [1, tokens], beginning with the longest stored prefix; the
        prompt's cache is stored afterwards. What cannot be reused or stored is computed, and `last` says why."""
        if input_ids.ndim != 2 or input_ids.shape[0] != 1:
            raise ValueError(f"input_ids: shape {tuple(input_ids.shape)}, expected (1, tokens)")
        tokens = input_ids[0].tolist()
        self.last = Reuse()
        cache = self.restore(tokens)
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        details = options.pop("return_dict_in_generate", False)
        output = self.model.generate(input_ids, past_key_values=cache, return_dict_in_generate=True, use_cache=True, **options)
        if save and len(tokens) - self.last.tokens >= self.min_tokens:
            self.save(output.past_key_values, tokens)
        return output if details else output.sequences

    def restore(self, tokens: Sequence[int]) -> Any:
        """A DynamicCache of the longest stored prefix, at least one token short of all; None: there is none."""
        start = time.perf_counter()
        try:
            with self.store.match(self.namespace, tokens, min_tokens=self.min_tokens) as match:
                usable = min(match.tokens, len(tokens) - 1)
                if not match or usable < self.min_tokens:
                    self.last.reason = match.reason
                    return None
                cache = cache_of(match, usable, config=self.model.config, device=self.model.device)
                self.last = Reuse(usable, "found", match.bytes, time.perf_counter() - start)
                return cache
        except XkvError as error:
            logger.warning("a stored prefix is not used: %s", error)
            self.last.reason = str(error)
            return None

    def save(self, cache: Any, tokens: Sequence[int]) -> Optional[PutReport]:
        """Store the first len(tokens) tokens of a cache; None: it cannot be, which is logged."""
        try:
            planes = planes_of(cache, tokens, rope_of(self.model, len(tokens)), latent=self.latent)
            self.last.stored = self.store.put_cache(self.namespace, planes, list(tokens), **self.options)
        except (XkvError, UnsupportedCache) as error:
            logger.warning("a prompt of %d tokens is not stored: %s", len(tokens), error)
            return None
        return self.last.stored
