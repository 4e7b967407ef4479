"""Tiny GGUF files, written as llama.cpp's converter writes them; shared by the tests."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from tiny import shake
from tiny_dense import dense_config
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedModel

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Gemma's names for what the others do not have, or call so.
_GEMMA_NAMES = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_MERGES = ["t h", "th e", "Ġ the"]  # the last needs a space before the word to stay with it
SPECIAL = ["<|end|>", "<|user|>"]
CHAT_TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


def gguf_model(**changes: object) -> PreTrainedModel:
    """A shaken Llama whose widths are whole quantisation blocks of 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 256 + 5, "rms_norm_eps": 1e-5}
    sizes |= {"max_position_embeddings": 512, "num_hidden_layers": 2, "tie_word_embeddings": True}
    return shake(AutoModelForCausalLM.from_config(dense_config("llama", **{**sizes, **changes})))


def gemma_model() -> PreTrainedModel:
    """A shaken Gemma 3, with what files do not say as its configuration has it by default."""
    rope = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    for kind in rope.values():
        kind["rope_type"] = "default"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 256 + 5, "num_hidden_layers": 6}
    sizes |= {
        "rope_parameters": rope,
        "layer_types": None,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": None,
    }
    return shake(AutoModelForCausalLM.from_config(dense_config("gemma3_text", **sizes))).eval()


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    quantisation: str = "F32",
    architecture: str = "llama",
    splitting: str = "smollm",
    fields: dict[str, str | int] | None = None,
    leave_out: str | None = None,
) -> Path:
    """Write `model` with a byte-level tokenizer.

    Args:
        path: File to write.
        model: From `gguf_model` or `gemma_model`.
        quantisation: Type of the matrices; vectors are in F32.
        architecture: What the file says it is.
        splitting: ``tokenizer.ggml.pre``.
        fields: Further fields, of text or small numbers.
        leave_out: Name of a tensor that is not written.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, splitting)
    for key, value in (fields or {}).items():
        (writer.add_uint16 if isinstance(value, int) else writer.add_string)(key, value)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, tensor in _stored(model).items():
        if name == leave_out:
            continue
        array = tensor.numpy()
        if array.ndim < 2 or quantisation == "F32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, splitting: str) -> None:
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in _MERGES)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def _stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors under llama.cpp's names, queries and keys with the two halves of a head's dimensions interleaved.

    Gemma's stay in order, and one is added to the weights of its norms, as its norms do.
    """
    found, gemma = {}, model.config.model_type == "gemma3_text"
    names = _NAMES | _GEMMA_NAMES if gemma else _NAMES
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if gemma and "norm" in module:
            tensor = tensor + 1
        if module in _OUTER:
            if module != "lm_head" or not model.config.tie_word_embeddings:
                found[f"{_OUTER[module]}.weight"] = tensor
            continue
        _, _, layer, kind = module.split(".", 3)
        if kind in ("self_attn.q_proj", "self_attn.k_proj") and not gemma:
            heads = tensor.shape[0] // model.config.head_dim
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        found[f"blk.{layer}.{names[kind]}.weight"] = tensor.contiguous()
    return {name: tensor.float() for name, tensor in found.items()}


def rounded(array: np.ndarray, quantisation: str) -> np.ndarray:
    """What `array` is after the type's rounding."""
    kind = gguf.GGMLQuantizationType[quantisation]
    return gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
