"""llama.cpp's side of `generate.py beside`: a model of the same shape in Q8_0, 8 bits with a scale for each 32 weights.

Runs in a Python with llama-cpp-python and gguf.  The weights are random and not those of the other contenders; the tied
embedding is Q8_0 too, as llama.cpp's own conversion writes it, where theirs is bfloat16.
"""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import time
from collections.abc import Callable

import gguf
import llama_cpp
import numpy as np

CELLS, ROWS = 4096, 64
"""Tokens that fit in the cache, of all rows together, and most rows."""

WEIGHT = 0.02
"""About the standard deviation of random weights."""


def write_model(config: dict, path: pathlib.Path) -> None:
    """Writes a Qwen3 without a vocabulary and with random weights, in the shape of a config.json."""
    random = np.random.default_rng(0)
    hidden, layers, head = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
    heads, kv_heads, wide = config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_context_length(CELLS)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int) -> None:
        blocks = np.empty((rows, columns // 32, 34), np.uint8)
        blocks[..., :2] = np.array([WEIGHT / 64], np.float16).view(np.uint8)
        blocks[..., 2:] = random.integers(0, 256, (rows, columns // 32, 32), np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def add_norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    add("token_embd", config["vocab_size"], hidden)
    add_norm("output_norm", hidden)
    for i in range(layers):
        add(f"blk.{i}.attn_q", heads * head, hidden)
        add(f"blk.{i}.attn_k", kv_heads * head, hidden)
        add(f"blk.{i}.attn_v", kv_heads * head, hidden)
        add(f"blk.{i}.attn_output", hidden, heads * head)
        add(f"blk.{i}.ffn_gate", wide, hidden)
        add(f"blk.{i}.ffn_up", wide, hidden)
        add(f"blk.{i}.ffn_down", hidden, wide)
        add_norm(f"blk.{i}.attn_norm", hidden)
        add_norm(f"blk.{i}.ffn_norm", hidden)
        add_norm(f"blk.{i}.attn_q_norm", head)
        add_norm(f"blk.{i}.attn_k_norm", head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def generator(folder: str) -> Callable[..., list[float]]:
    """Returns a greedy generator: `generate(prompts, count)`, the times at which each step of all rows ended."""
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    path = pathlib.Path(folder) / "model.gguf"
    write_model(config, path)
    parameters = llama_cpp.llama_model_default_params()
    parameters.use_mmap = False
    model = llama_cpp.llama_load_model_from_file(str(path).encode(), parameters)
    path.unlink()
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = CELLS, 2048, 512, ROWS
    options.n_threads = options.n_threads_batch = os.cpu_count() or 1
    options.kv_unified = True
    context = llama_cpp.llama_new_context_with_model(model, options)
    assert context, "llama.cpp has made no context"
    batch = llama_cpp.llama_batch_init(2048, 0, 1)
    vocabulary = config["vocab_size"]

    def run(tokens: np.ndarray, start: int) -> np.ndarray:
        """Returns the next token of each row, after tokens (rows, length) at positions from `start`."""
        rows, length = tokens.shape
        batch.n_tokens = rows * length
        for i, (row, at) in enumerate(np.ndindex(rows, length)):
            batch.token[i], batch.pos[i] = int(tokens[row, at]), start + at
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, row, at == length - 1
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not decode")
        last = [row * length + length - 1 for row in range(rows)]
        logits = [llama_cpp.llama_get_logits_ith(context, i) for i in last]
        arrays = [
            np.ctypeslib.as_array(ctypes.cast(each, ctypes.POINTER(ctypes.c_float)), (vocabulary,)) for each in logits
        ]
        return np.array([array.argmax() for array in arrays])[:, None]

    def generate(prompts: np.ndarray, count: int) -> list[float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        token, times = run(prompts, 0), [time.perf_counter()]
        for step in range(count - 1):
            token = run(token, prompts.shape[1] + step)
            times.append(time.perf_counter())
        return times

    return generate
