"""Namespaces and prompts: what a store finds entries by."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple, Union

from ._call import call
from ._native import ffi, lib
from .geometry import Tokens, int32_array, pointer_to
from .model import Model


class Namespace:
    """What must be equal for caches to be interchangeable; prompts never match across namespaces."""

    def __init__(self, model: Union[Model, bytes, None] = None, *, settings: str = "", lora: str = "",
                 salt: bytes = b"") -> None:
        """model: it, or its fingerprint [16 bytes]. settings: whatever else makes caches differ (element types, context
        length, ...). lora: adapter. salt: the tenant's secret, without which nothing of the namespace is found."""
        fingerprint = model.fingerprint if isinstance(model, Model) else model
        fields = ffi.new("xkv_namespace_fields *", lib.xkv_namespace_fields_default())
        keep = [ffi.new("char[]", settings.encode()), ffi.new("char[]", lora.encode())]
        if fingerprint is not None:
            if len(fingerprint) != 16:
                raise ValueError(f"fingerprint: {len(fingerprint)} bytes, expected 16")
            keep.append(ffi.new("uint8_t[]", fingerprint))
            fields.fingerprint = keep[-1]
        if salt:
            keep.append(ffi.new("uint8_t[]", salt))
            fields.salt, fields.salt_size = keep[-1], len(salt)
        fields.settings, fields.lora = keep[0], keep[1]
        self.pointer = ffi.new("xkv_namespace *")
        call(lib.xkv_namespace_make, fields, self.pointer)

    @property
    def id(self) -> bytes:
        """SHA-256 of all of it, 32 bytes."""
        return bytes(ffi.buffer(self.pointer.id))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Namespace) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<xkv.Namespace {self.id.hex()[:16]}>"


@dataclass(frozen=True)
class Media:
    """Something that is not a token, such as an image: it lies before `first_token`; `id` tells it from others."""

    first_token: int
    id: bytes


class Prompt:
    """Tokens, and media among them in order."""

    def __init__(self, tokens: Tokens, media: Sequence[Media] = ()) -> None:
        self.tokens = int32_array(tokens, "tokens")
        self.media = tuple(media)
        self.pointer = ffi.new("xkv_prompt *")
        self.pointer.tokens, self.pointer.token_count = pointer_to(self.tokens), len(self.tokens)
        self._keep = [ffi.new("uint8_t[]", m.id) for m in self.media]
        self._media = ffi.new("xkv_media[]", max(len(self.media), 1))
        for c, m, data in zip(self._media, self.media, self._keep):
            c.first_token, c.id, c.id_size = m.first_token, data, len(m.id)
        self.pointer.media, self.pointer.media_count = self._media, len(self.media)

    def __len__(self) -> int:
        return len(self.tokens)


PromptLike = Union[Prompt, Tokens]


def prompt_of(tokens: PromptLike) -> Prompt:
    return tokens if isinstance(tokens, Prompt) else Prompt(tokens)


@dataclass(frozen=True)
class PageKey:
    """An engine's name for the leading `tokens` of a prompt."""

    key: bytes  # 32
    tokens: int


def native_chain(namespace: Namespace, tokens: PromptLike, block_tokens: int = 256) -> List[PageKey]:
    """xkv's own names, one for each block (spec/store.md, section 4)."""
    prompt = prompt_of(tokens)
    return _chain(-(-len(prompt) // max(block_tokens, 1)), lib.xkv_chain_native, namespace.pointer, prompt.pointer,
                  block_tokens)


def sglang_chain(tokens: Tokens, page_tokens: int) -> List[PageKey]:
    """SGLang's, of full pages."""
    prompt = Prompt(tokens)
    return _chain(len(prompt) // max(page_tokens, 1), lib.xkv_chain_sglang, prompt.pointer.tokens, len(prompt), page_tokens)


def vllm_chain(tokens: Tokens, block_tokens: int, seed: str = "0") -> List[PageKey]:
    """vLLM's of algorithm sha256_cbor, of full blocks. seed: the text of PYTHONHASHSEED."""
    prompt = Prompt(tokens)
    return _chain(len(prompt) // max(block_tokens, 1), lib.xkv_chain_vllm, seed.encode(), prompt.pointer.tokens,
                  len(prompt), block_tokens)


def _chain(count: int, function: Any, *arguments: Any) -> List[PageKey]:
    keys = ffi.new("xkv_page_key[]", max(count, 1))
    call(function, *arguments, keys)
    return [PageKey(bytes(ffi.buffer(keys[i].key)), keys[i].tokens) for i in range(count)]


def page_keys(keys: Optional[Sequence[PageKey]]) -> Tuple[Any, int]:
    """xkv_page_key[], and how many."""
    if not keys:
        return ffi.NULL, 0
    out = ffi.new("xkv_page_key[]", len(keys))
    for c, key in zip(out, keys):
        if len(key.key) != 32:
            raise ValueError(f"page key: {len(key.key)} bytes, expected 32")
        ffi.memmove(c.key, key.key, 32)
        c.tokens = key.tokens
    return out, len(keys)
