"""vLLM's paged caches as planes, with axes that are demanded, never guessed."""
from __future__ import annotations

import re
from typing import Any, Dict, List, Sequence, Tuple

from .._arrays import as_array
from ..geometry import Plane
from ..pages import Pages, check_page_tokens

_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class Layout:
    """What one block of one layer holds, as vLLM's kv_cache_config says."""

    def __init__(self, kv_cache_config: Any, hf_config: Any, axes: str, block_tokens: int) -> None:
        """axes: of the tensors of a layer, as for xkv.Pages. ValueError: a kind of cache that is not supported."""
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ValueError(f"xkv.vllm: {len(groups)} groups of layers with blocks of their own: models with sliding windows, "
                             "Mamba or other state beside full attention are not supported (with "
                             "--disable-hybrid-kv-cache-manager vLLM holds all tokens of sliding windows, too)")
        spec, self.names = groups[0].kv_cache_spec, sorted(groups[0].layer_names, key=_by_number)
        kind = type(spec).__name__
        if kind not in ("FullAttentionSpec", "MLAAttentionSpec"):
            raise ValueError(f"xkv.vllm: a cache of {kind} is not supported")
        dtype = str(spec.dtype).rpartition(".")[2]
        mode = getattr(spec, "kv_quant_mode", 0)
        if dtype not in _TYPES or int(getattr(mode, "value", mode)) != 0:
            raise ValueError(f"xkv.vllm: a cache of {dtype}, quantized: fp8 and other quantized caches are not supported")
        if getattr(spec, "num_head_slots", None) or getattr(spec, "state_content_bytes", None) or (
                getattr(spec, "tokens_per_state", 1) != 1):
            raise ValueError("xkv.vllm: packed states in place of K and V are not supported")
        if int(spec.block_size) != block_tokens:
            raise ValueError(f"xkv.vllm: layers have blocks of {spec.block_size} tokens, the scheduler of {block_tokens}")
        check_page_tokens("xkv.vllm", block_tokens)
        self.heads, self.head_dim, self.dtype = int(spec.num_kv_heads), int(spec.head_size), _TYPES[dtype]
        self.kinds, self.widths = self._parts(kind, spec, hf_config)
        self.axes, self.block_tokens = axes, block_tokens
        self.settings = f"dtype={self.dtype} heads={self.heads} widths={self.widths}"

    def _parts(self, kind: str, spec: Any, hf_config: Any) -> Tuple[Tuple[str, ...], Tuple[int, int]]:
        if kind == "MLAAttentionSpec":
            latent = int(hf_config.kv_lora_rank)
            return ("latent", "K-rope"), (latent, self.head_dim - latent)
        return ("K", "V"), (self.head_dim, int(getattr(spec, "head_size_v", None) or self.head_dim))

    def planes(self, rotated: bool) -> Tuple[Plane, ...]:
        return tuple(Plane(layer, kind, self.heads, width, self.dtype, 0 if rotated and kind == "K" else None)
                     for layer in range(len(self.names)) for kind, width in zip(self.kinds, self.widths))


class Caches:
    """The tensors of a worker's layers."""

    def __init__(self, layout: Layout, tensors: Dict[str, Any]) -> None:
        """ValueError: one is missing, or not as the layout says."""
        absent = [name for name in layout.names if name not in tensors]
        if absent:
            raise ValueError(f"xkv.vllm: no cache of layer {absent[0]}")
        self._layout, self._tensors = layout, [tensors[name] for name in layout.names]
        for name, tensor in zip(layout.names, self._tensors):
            self._check(name, tuple(tensor.shape))
        self.on_host = all(str(getattr(tensor, "device", "cpu")).startswith("cpu") for tensor in self._tensors)

    def _check(self, name: str, shape: Tuple[int, ...]) -> None:
        layout = self._layout
        sizes = {"K": 2, "H": layout.heads, "N": layout.block_tokens, "C": sum(layout.widths), "D": layout.head_dim}
        if len(shape) != len(layout.axes) or any(sizes.get(axis, size) != size for axis, size in zip(layout.axes, shape)):
            raise ValueError(f"xkv.vllm: the cache of {name} has shape {shape}, not {layout.axes} with "
                             f"{ {axis: sizes[axis] for axis in layout.axes if axis in sizes} }: set \"layout\" to the axes of "
                             "this vLLM's caches, as KBNHD or BKNHD (K and V, blocks, slots, heads, dims) before 0.26")

    def pages(self, blocks: Sequence[int]) -> List[Pages]:
        """Of a sequence in these blocks, where they lie."""
        return self._pages([as_array(tensor)[0] if self.on_host else tensor for tensor in self._tensors], blocks)

    def _pages(self, tensors: Sequence[Any], table: Sequence[int]) -> List[Pages]:
        return [Pages(tensor, self._layout.axes, table, self._layout.kinds, layer) for layer, tensor in enumerate(tensors)]

    # --- On a device: by way of copies of the sequence's blocks ---

    def fetched(self, blocks: Sequence[int]) -> List[Pages]:
        """Copies of the blocks in host memory."""
        at = self._layout.axes.index("B")
        copies = [tensor.index_select(at, _index(tensor, blocks)).cpu() for tensor in self._tensors]
        return self._pages(copies, range(len(blocks)))

    def emptied(self, blocks: Sequence[int]) -> List[Pages]:
        """Room for the blocks in host memory, to be given to store()."""
        at = self._layout.axes.index("B")
        room = []
        for tensor in self._tensors:
            shape = list(tensor.shape)
            shape[at] = len(blocks)
            room.append(tensor.new_empty(shape, device="cpu"))
        return self._pages(room, range(len(blocks)))

    def store(self, pages: Sequence[Pages], blocks: Sequence[int], first: int) -> None:
        """Copy blocks[first:] from there to the device."""
        at = self._layout.axes.index("B")
        for tensor, page in zip(self._tensors, pages):
            part = page.tensor.narrow(at, first, len(blocks) - first).to(tensor.device)
            tensor.index_copy_(at, _index(tensor, blocks[first:]), part)
        for device in {tensor.device for tensor in self._tensors if tensor.device.type != "cpu"}:
            import torch
            torch.accelerator.current_stream(device).synchronize()  # this thread's: others may read the blocks now


def _index(tensor: Any, blocks: Sequence[int]) -> Any:
    import torch
    return torch.tensor(list(blocks), dtype=torch.int64, device=tensor.device)


def _by_number(name: str) -> List[Any]:
    """Layer 10 comes after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
