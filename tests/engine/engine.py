"""llama.cpp through its C API: evaluate, save, load and cut the cache of one sequence."""
import ctypes
import os

import llama_cpp as llama
import numpy as np

F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30  # ggml types
BATCH = 256

llama.llama_backend_init()
_silent = llama.llama_log_callback(lambda *_: None)
llama.llama_log_set(_silent, ctypes.c_void_p(0))


class Model:
    def __init__(self, path):
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self.handle = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise RuntimeError(f"the engine does not load {path}")
        self.vocab = llama.llama_model_get_vocab(self.handle)
        self.vocab_size = llama.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text):
        raw = text.encode()
        tokens = (llama.llama_token * (len(raw) + 1))()
        count = llama.llama_tokenize(self.vocab, raw, len(raw), tokens, len(tokens), True, False)
        return tokens[:count]


class Context:
    """One sequence. Raises ValueError when the engine does not take this kind of cache."""

    def __init__(self, model, capacity, kv_type, flash):
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = capacity, BATCH, BATCH
        params.n_threads = params.n_threads_batch = os.cpu_count()
        params.type_k = params.type_v = kv_type
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.model, self.capacity, self.used = model, capacity, 0
        self.handle = llama.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise ValueError("the engine does not take this kind of cache")
        self.memory = llama.llama_get_memory(self.handle)

    def close(self):
        llama.llama_free(self.handle)

    def clear(self):
        llama.llama_memory_clear(self.memory, True)
        self.used = 0

    def _decode(self, tokens, want_logits):
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self.used + i, 1, want_logits
            batch.seq_id[i][0] = 0
        status = llama.llama_decode(self.handle, batch)
        llama.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")
        self.used += len(tokens)

    def prefill(self, tokens):
        for i in range(0, len(tokens), BATCH):
            self._decode(tokens[i:i + BATCH], False)

    def logits(self, tokens):
        """Append tokens; the scores of the next token behind each of them, [len(tokens), vocabulary]."""
        out = np.empty((len(tokens), self.model.vocab_size), np.float32)
        for i in range(0, len(tokens), BATCH):
            part = tokens[i:i + BATCH]
            self._decode(part, True)
            scores = llama.llama_get_logits(self.handle)
            out[i:i + len(part)] = np.ctypeslib.as_array(scores, (len(part), self.model.vocab_size))
        return out

    def greedy(self, token, count):
        """The `count` most likely tokens behind `token`, one by one."""
        out = []
        for _ in range(count):
            token = int(self.logits([token])[0].argmax())
            out.append(token)
        return out

    def save(self, path, tokens):
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_state_seq_save_file(self.handle, str(path).encode(), 0, array, len(tokens)) == 0:
            raise RuntimeError(f"the engine does not save {path}")

    def load(self, path):
        """Restore a sequence file; the tokens stored in it."""
        self.clear()
        array, count = (llama.llama_token * self.capacity)(), ctypes.c_size_t()
        if llama.llama_state_seq_load_file(self.handle, str(path).encode(), 0, array, self.capacity,
                                           ctypes.byref(count)) == 0:
            raise RuntimeError(f"the engine refuses {path}")
        self.used = count.value
        return array[:count.value]

    def cut(self, count):
        """Forget all but the first `count` tokens."""
        if not llama.llama_memory_seq_rm(self.memory, 0, count, -1):
            raise RuntimeError("the engine cannot cut the sequence")
        self.used = count
