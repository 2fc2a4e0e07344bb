"""The cache of one sequence, as the engine hands it over, and as its sequence file.

    file          magic, version, n_tokens, tokens[n_tokens], memory state
    sequence data [prefix: 0xaf143cd8, sequence id,] memory state          llama_state_seq_get_data
    context data  length and name of the architecture, memory state        llama_state_get_data
"""
from __future__ import annotations

import ctypes
import struct
from typing import Any, Sequence

import llama_cpp
import numpy as np

_HEAD = 12
_PREFIX = 8
_PREFIX_MAGIC = 0xAF143CD8  # in front of sequence data since build 9049


class EngineError(RuntimeError):
    """The engine does not hand over a state, or refuses one."""


def sequence_header(tokens: Sequence[int]) -> bytes:
    head = struct.pack("<III", llama_cpp.LLAMA_STATE_SEQ_MAGIC, llama_cpp.LLAMA_STATE_SEQ_VERSION, len(tokens))
    return head + np.asarray(tokens, "<i4").tobytes()


def memory_offset(image: Any) -> int:
    """Where the memory state begins in a sequence file of this engine's version."""
    magic, version, count = struct.unpack_from("<III", image, 0)
    if (magic, version) != (llama_cpp.LLAMA_STATE_SEQ_MAGIC, llama_cpp.LLAMA_STATE_SEQ_VERSION):
        raise EngineError(f"a sequence file of version {version}; this engine reads {llama_cpp.LLAMA_STATE_SEQ_VERSION}")
    return int(_HEAD + 4 * count)


def save_sequence(ctx: Any, tokens: Sequence[int], sequence: int = 0) -> bytearray:
    """The sequence file of what the engine has computed for `tokens`. ctx: llama_context_p."""
    header = sequence_header(tokens)
    size = int(llama_cpp.llama_state_seq_get_size(ctx, sequence))
    at = len(header) - _PREFIX  # the data's prefix lies where the header's end will be written
    image = bytearray(len(header) + size)
    target = (ctypes.c_uint8 * size).from_buffer(image, at)
    got = int(llama_cpp.llama_state_seq_get_data(ctx, target, size, sequence))
    del target
    if got == 0 or got > size:
        raise EngineError(f"the engine gives {got} bytes of state, {size} announced")
    if struct.unpack_from("<I", image, at)[0] != _PREFIX_MAGIC:  # an older engine: no prefix
        image[len(header):len(header) + got] = image[at:at + got]
        end = len(header) + got
    else:
        end = at + got
    image[:len(header)] = header
    del image[end:]
    return image


def save_context(ctx: Any, tokens: Sequence[int]) -> bytearray:
    """The same of a context that holds nothing but sequence 0, with what sliding windows have left behind."""
    size = int(llama_cpp.llama_state_get_size(ctx))
    image = bytearray(size)
    target = (ctypes.c_uint8 * size).from_buffer(image)
    got = int(llama_cpp.llama_state_get_data(ctx, target, size))
    del target
    if got == 0 or got > size:
        raise EngineError(f"the engine gives {got} bytes of state, {size} announced")
    image[:_memory_of_context(image)] = sequence_header(tokens)
    del image[len(image) - (size - got):]
    return image


def load_sequence(ctx: Any, image: bytearray, sequence: int = 0) -> None:
    """Give the engine a sequence file; what the sequence held goes. `image` is used up: its header is overwritten.

    The engine ends the process at a truncated state: pass only what has been checked."""
    start = memory_offset(image)
    if _has_prefix(ctx):
        start -= _PREFIX
        struct.pack_into("<Ii", image, start, _PREFIX_MAGIC, sequence)
    size = len(image) - start
    memory = llama_cpp.llama_get_memory(ctx)
    llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
    source = (ctypes.c_uint8 * size).from_buffer(image, start)
    taken = int(llama_cpp.llama_state_seq_set_data(ctx, source, size, sequence))
    del source
    if taken != size:
        llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)  # a failed load leaves half a sequence
        raise EngineError(f"the engine refuses the state ({taken} of {size} bytes taken)")


def cut_sequence(ctx: Any, tokens: int, sequence: int = 0) -> None:
    """Forget all but the first `tokens`."""
    memory = llama_cpp.llama_get_memory(ctx)
    if not llama_cpp.llama_memory_seq_rm(memory, sequence, tokens, -1):
        llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
        raise EngineError(f"the engine cannot cut the sequence to {tokens} tokens")


def has_windows(model: Any) -> bool:
    """Whether layers have sliding windows. model: llama_model_p."""
    return int(llama_cpp.llama_model_n_swa(model)) > 0


def _has_prefix(ctx: Any) -> bool:
    """Whether this engine's sequence data begin with the prefix: seen on a sequence, even an empty one."""
    size = int(llama_cpp.llama_state_seq_get_size(ctx, 0))
    data = (ctypes.c_uint8 * size)()
    got = int(llama_cpp.llama_state_seq_get_data(ctx, data, size, 0))
    return got >= _PREFIX and struct.unpack_from("<I", data)[0] == _PREFIX_MAGIC


def sequence_of_context(state: bytes, tokens: Sequence[int]) -> bytes:
    """Sequence file of the data of a context that holds one sequence."""
    return sequence_header(tokens) + state[_memory_of_context(state):]


def _memory_of_context(state: Any) -> int:
    """Where the memory state begins in the data of a context."""
    (length,) = struct.unpack_from("<I", state, 0)
    if 4 + length > len(state):
        raise EngineError("the context's data are too short for the name of its architecture")
    return int(4 + length)


def context_of_sequence(image: Any, architecture: str) -> bytes:
    """The inverse."""
    name = architecture.encode()
    return struct.pack("<I", len(name)) + name + bytes(memoryview(image)[memory_offset(image):])
