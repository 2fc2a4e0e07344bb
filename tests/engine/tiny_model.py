"""A small model of random weights whose layers have sliding windows, for what needs an engine but no sense."""
import gguf
import numpy as np

EMBEDDING, HEADS, HEAD_DIM, FORWARD, VOCABULARY = 64, 2, 64, 128, 300
LAYERS, WINDOW = 7, 64  # gemma3: all layers but the sixth have a window


def write_gemma3(path):
    """Gemma 3 with one KV head; layers with a window rotate at base 10,000, the other at 1,000,000."""
    writer, random = gguf.GGUFWriter(path, "gemma3", use_temp_file=False), np.random.default_rng(1)
    write_metadata(writer)
    write_vocabulary(writer)

    def weight(name, *shape):
        values = random.normal(size=shape) / np.sqrt(shape[-1]) if len(shape) > 1 else 1 + random.normal(size=shape) / 4
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    weight("token_embd", VOCABULARY, EMBEDDING)
    weight("output_norm", EMBEDDING)
    for i in range(LAYERS):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            weight(f"blk.{i}.{name}", EMBEDDING)
        weight(f"blk.{i}.attn_q", HEADS * HEAD_DIM, EMBEDDING)
        weight(f"blk.{i}.attn_k", HEAD_DIM, EMBEDDING)
        weight(f"blk.{i}.attn_v", HEAD_DIM, EMBEDDING)
        weight(f"blk.{i}.attn_output", EMBEDDING, HEADS * HEAD_DIM)
        weight(f"blk.{i}.attn_q_norm", HEAD_DIM)
        weight(f"blk.{i}.attn_k_norm", HEAD_DIM)
        weight(f"blk.{i}.ffn_gate", FORWARD, EMBEDDING)
        weight(f"blk.{i}.ffn_up", FORWARD, EMBEDDING)
        weight(f"blk.{i}.ffn_down", EMBEDDING, FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_metadata(writer):
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
    writer.add_sliding_window(WINDOW)


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
