"""llama.cpp through its C API: evaluate, save, load and cut the cache of one sequence; watch tensors.

For measurements: what reuses prefixes works on the user's own llama_cpp.Llama (prefixes.py)."""
from __future__ import annotations

import ctypes
import os
from typing import Any, Callable, List, Optional, Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt

from .._files import Path, encoded
from .state import EngineError, cut_sequence, has_windows, load_sequence, memory_offset, save_context, save_sequence

F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30  # ggml types
BATCH = 256

Watch = Callable[[str, npt.NDArray[np.float32]], None]
_log = None


def silence() -> None:
    """The engine's messages go nowhere."""
    global _log
    if _log is None:
        _log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))


class Model:
    """The weights and the vocabulary."""

    def __init__(self, path: Path) -> None:
        silence()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.handle = llama_cpp.llama_model_load_from_file(encoded(path), params)
        if not self.handle:
            raise EngineError(f"the engine does not load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.handle)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.layers: int = llama_cpp.llama_model_n_layer(self.handle)
        self.heads: int = llama_cpp.llama_model_n_head(self.handle)

    def tokenize(self, text: str) -> List[int]:
        raw = text.encode()
        tokens = (llama_cpp.llama_token * (len(raw) + 1))()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), tokens, len(tokens), True, False)
        return list(tokens[:count])

    def text(self, tokens: Sequence[int]) -> str:
        """The inverse."""
        out = b""
        for token in tokens:
            piece = ctypes.create_string_buffer(256)
            size = llama_cpp.llama_token_to_piece(self.vocab, token, piece, len(piece), 0, True)
            out += piece.raw[:max(size, 0)]
        return out.decode(errors="replace")


class Context:
    """One sequence. Raises ValueError when the engine does not take this kind of cache."""

    def __init__(self, model: Model, capacity: int, kv_type: int = F16, flash: bool = True,
                 watch: Optional[Watch] = None, watched: Sequence[str] = ()) -> None:
        """watch(name, values): called with what is computed for tensors whose name is one of `watched`, without the
        layer ("Qcur" is called with "Qcur-0", ...): [rows, ..., elements]."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = capacity, BATCH, BATCH
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        params.type_k = params.type_v = kv_type
        params.flash_attn_type = (llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash
                                  else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        self._raised: Optional[BaseException] = None
        if watch is not None:
            self._callback = _EVAL_CALLBACK(self._watcher(watch, frozenset(watched)))
            params.cb_eval = ctypes.cast(self._callback, type(params.cb_eval))
        self.model, self.capacity, self.used = model, capacity, 0
        self.handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise ValueError("the engine does not take this kind of cache")
        self.memory = llama_cpp.llama_get_memory(self.handle)

    def close(self) -> None:
        llama_cpp.llama_free(self.handle)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)
        self.used = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        for i in range(0, len(tokens), BATCH):
            self._decode(tokens[i:i + BATCH], False)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens; the scores of the next token behind each of them, [len(tokens), vocabulary]."""
        out = np.empty((len(tokens), self.model.vocab_size), np.float32)
        for i in range(0, len(tokens), BATCH):
            part = tokens[i:i + BATCH]
            self._decode(part, True)
            scores = llama_cpp.llama_get_logits(self.handle)
            out[i:i + len(part)] = np.ctypeslib.as_array(scores, (len(part), self.model.vocab_size))
        return out

    def greedy(self, token: int, count: int) -> List[int]:
        """The `count` most likely tokens behind `token`, one by one."""
        out = []
        for _ in range(count):
            token = int(self.logits([token])[0].argmax())
            out.append(token)
        return out

    def image(self, tokens: Sequence[int]) -> bytearray:
        """The sequence file of the tokens that were evaluated, in memory; all of them in layers with windows, too."""
        save = save_context if has_windows(self.model.handle) else save_sequence
        return save(self.handle, tokens)

    def set_image(self, image: bytearray) -> None:
        """Restore a sequence file in memory, which is used up."""
        count = (memory_offset(image) - 12) // 4
        load_sequence(self.handle, image)
        self.used = count

    def save(self, path: Path, tokens: Sequence[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_state_seq_save_file(self.handle, encoded(path), 0, array, len(tokens)) == 0:
            raise EngineError(f"the engine does not save {path}")

    def load(self, path: Path) -> List[int]:
        """Restore a sequence file; the tokens stored in it."""
        self.clear()
        array, count = (llama_cpp.llama_token * self.capacity)(), ctypes.c_size_t()
        if llama_cpp.llama_state_seq_load_file(self.handle, encoded(path), 0, array, self.capacity,
                                               ctypes.byref(count)) == 0:
            raise EngineError(f"the engine refuses {path}")
        self.used = count.value
        return list(array[:count.value])

    def cut(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        cut_sequence(self.handle, count)
        self.used = count

    def _decode(self, tokens: Sequence[int], want_logits: bool) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self.used + i, 1, want_logits
            batch.seq_id[i][0] = 0
        status = llama_cpp.llama_decode(self.handle, batch)
        llama_cpp.llama_batch_free(batch)
        if self._raised is not None:
            raise self._raised
        if status != 0:
            raise EngineError(f"llama_decode: {status}")
        self.used += len(tokens)

    def _watcher(self, watch: Watch, watched: Any) -> Callable[[int, bool, Any], bool]:
        def on_tensor(tensor: int, ask: bool, _: Any) -> bool:
            try:
                name = _ggml().ggml_get_name(tensor).decode(errors="ignore")
                if name.rpartition("-")[0] not in watched or not name.rpartition("-")[2].isdigit():
                    return not ask
                if not ask:
                    watch(name, _values(tensor))
            except BaseException as error:  # also KeyboardInterrupt: it must not be lost in C
                self._raised = error
                return False
            return True
        return on_tensor


# --- Tensors ---

_EVAL_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


class _TensorHead(ctypes.Structure):
    """The first fields of struct ggml_tensor (ggml.h)."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4),
                ("nb", ctypes.c_size_t * 4)]


def _ggml() -> Any:
    from llama_cpp._ggml import libggml
    libggml.ggml_get_name.restype = ctypes.c_char_p
    libggml.ggml_get_name.argtypes = [ctypes.c_void_p]
    libggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return libggml


def _values(tensor: int) -> npt.NDArray[np.float32]:
    """A copy of an f32 tensor, slowest dimension first; its dimensions of size 1 at the slow end are left out."""
    head = _TensorHead.from_address(tensor)
    if head.type != F32:
        raise EngineError(f"a watched tensor has type {head.type}, f32 expected")
    sizes, strides = list(head.ne), list(head.nb)
    span = sum((n - 1) * b for n, b in zip(sizes, strides)) + 4
    data = np.empty(span, np.uint8)
    _ggml().ggml_backend_tensor_get(tensor, data.ctypes.data, 0, span)
    values = np.ndarray(sizes[::-1], np.float32, data, 0, strides[::-1])
    return np.ascontiguousarray(values.reshape(values.shape[next((i for i in range(4) if values.shape[i] > 1), 3):]))
