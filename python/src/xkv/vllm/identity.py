"""What makes vLLM's caches differ: model, rank, adapter, salt; and what is in a prompt."""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, List, Optional, Tuple

import numpy as np
import numpy.typing as npt

from .._serving import Config, rope_of_config
from .._weights import model_fingerprint
from ..geometry import Rope
from ..prompt import Media, Namespace, Prompt
from .caches import Layout


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt, and whose it is. Travels from the scheduler to the workers."""

    tokens: npt.NDArray[np.int32]
    media: Tuple[Tuple[int, str], ...]  # (first token, hash) of images and the like
    lora: str
    salt: str

    def prompt(self, tokens: Optional[int] = None) -> Prompt:
        """Its first tokens, or all."""
        count = len(self.tokens) if tokens is None else tokens
        return Prompt(self.tokens[:count], [Media(first, name.encode()) for first, name in self.media if first < count])


class Identity:
    """Of one engine: model, settings and ranks."""

    def __init__(self, vllm_config: Any, config: Config, layout: Layout) -> None:
        parallel, model = vllm_config.parallel_config, vllm_config.model_config
        sliced = ("decode_context_parallel_size", "prefill_context_parallel_size")
        if any(getattr(parallel, name, 1) > 1 for name in sliced):
            raise ValueError("xkv.vllm: context parallel ranks hold parts of the tokens, which is not supported")
        self.rank, self.world = int(parallel.rank), int(parallel.world_size)
        self._fingerprint = model_fingerprint(config.model or str(model.model), str(getattr(model, "revision", None) or ""))
        self._settings = (f"vllm {layout.settings} model={model.dtype} quantization={model.quantization} "
                          f"tp={parallel.tensor_parallel_size} pp={parallel.pipeline_parallel_size}")
        told = config.rope if config.rope is not None else model.hf_text_config.to_dict()
        self.rope: Optional[Rope] = rope_of_config(told, layout.head_dim) if layout.kinds[0] == "K" else None
        self._namespace = functools.lru_cache(256)(self._made)

    def prefix_of(self, request: Any) -> Optional[Prefix]:
        """Of a request's prompt; None: it has embeddings in place of tokens, and is not stored."""
        if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
            return None
        media = sorted((int(f.mm_position.offset), str(f.identifier)) for f in request.mm_features or ())
        lora = request.lora_request
        return Prefix(np.asarray(request.prompt_token_ids, np.int32), tuple(media),
                      f"{lora.lora_name} {lora.lora_path}" if lora is not None else "", request.cache_salt or "")

    def ranks(self, prefix: Prefix) -> List[Namespace]:
        """Where each rank has its part."""
        return [self._namespace(rank, prefix.lora, prefix.salt) for rank in range(self.world)]

    def own(self, prefix: Prefix) -> Namespace:
        return self._namespace(self.rank, prefix.lora, prefix.salt)

    def _made(self, rank: int, lora: str, salt: str) -> Namespace:
        return Namespace(self._fingerprint, settings=f"{self._settings} rank={rank}", lora=lora, salt=salt.encode())
