"""Small models of random weights, for what needs an engine but no sense: gemma3, most of whose layers have sliding
windows, and qwen2vl, whose tokens have positions of several parts (M-RoPE)."""
import gguf
import numpy as np

EMBEDDING, HEADS, HEAD_DIM, FORWARD, VOCABULARY = 128, 2, 64, 128, 300
LAYERS, WINDOW = 7, 64  # gemma3: all layers but the sixth have a window


def write_model(path, architecture):
    """One KV head. In gemma3, layers with a window rotate at base 10,000, the other at 1,000,000."""
    writer, random = gguf.GGUFWriter(path, architecture, use_temp_file=False), np.random.default_rng(1)
    gemma = architecture == "gemma3"
    write_metadata(writer, gemma)
    write_vocabulary(writer)

    def tensor(name, *shape):
        values = random.normal(size=shape) / np.sqrt(shape[-1]) if len(shape) > 1 else 1 + random.normal(size=shape) / 4
        writer.add_tensor(name, values.astype(np.float32))
    tensor("token_embd.weight", VOCABULARY, EMBEDDING)
    tensor("output_norm.weight", EMBEDDING)
    for i in range(LAYERS):
        for name in ("attn_norm", "ffn_norm") + (("post_attention_norm", "post_ffw_norm") if gemma else ()):
            tensor(f"blk.{i}.{name}.weight", EMBEDDING)
        for name, rows in (("q", HEADS * HEAD_DIM), ("k", HEAD_DIM), ("v", HEAD_DIM)):
            tensor(f"blk.{i}.attn_{name}.weight", rows, EMBEDDING)
            if not gemma:
                tensor(f"blk.{i}.attn_{name}.bias", rows)
        for name in ("attn_q_norm", "attn_k_norm") if gemma else ():
            tensor(f"blk.{i}.{name}.weight", HEAD_DIM)
        tensor(f"blk.{i}.attn_output.weight", EMBEDDING, HEADS * HEAD_DIM)
        tensor(f"blk.{i}.ffn_gate.weight", FORWARD, EMBEDDING)
        tensor(f"blk.{i}.ffn_up.weight", FORWARD, EMBEDDING)
        tensor(f"blk.{i}.ffn_down.weight", EMBEDDING, FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_metadata(writer, gemma):
    writer.add_context_length(4096)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    if gemma:
        writer.add_sliding_window(WINDOW)
    else:
        writer.add_rope_dimension_sections([16, 8, 8, 0])


def write_vocabulary(writer):
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    tokens += [f"word{i}" for i in range(VOCABULARY - len(tokens))]
    kinds = [gguf.TokenType.UNKNOWN] + 2 * [gguf.TokenType.CONTROL] + 256 * [gguf.TokenType.BYTE]
    kinds += [gguf.TokenType.NORMAL] * (VOCABULARY - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
