"""What a grafted model computes, written from the design's words in loops and float64: no code of the package is used.

Every attention layer has a sliding window of W tokens and a few sinks; the queries of a memory cell (a layer's
key-value head) also read, inside the same softmax, the tokens under the units of S tokens that lie wholly outside the
window. A unit's S keys (their rotation undone) and values, of all cells of a layer, are packed into a latent by the
chunker and unpacked by the converter, and far keys meet the query with its rotation undone. Each head's half of a
latent is stored in a few bits. Window and units cover every earlier token once: the window reaches back to a multiple
of S.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Rules:
    """What a family's attention does its own way.

    Attributes:
        theta, slower: Base of the rotation, and a factor by which it is slower (linear scaling).
        rotated: Dimensions of a head that are rotated, the first ones; None: all.
        neighbours: Whether pairs are (2i, 2i + 1), not (i, i + half).
        scale: Factor on dot products; None: ``D ** -0.5``.
        softcap: Bound c of scores: ``c * tanh(score / c)``.
        gain: Factor on the query at a position.
        norms: Norm of projected queries or keys ``[T, heads, D]``, given its weight.
        window: Tokens that a local layer sees; None: the layer is PHOTON's.
        gated: Whether the map of queries also gives, after each head's query, a gate on the head's output.
        has_sink_logits: Whether each head has a key of value zero, with a learned score.
    """

    theta: float
    slower: float = 1.0
    rotated: int | None = None
    neighbours: bool = False
    scale: float | None = None
    softcap: float | None = None
    gain: Callable[[int], float] = lambda position: 1.0
    norms: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    window: int | None = None
    gated: bool = False
    has_sink_logits: bool = False


def rotate(vector: torch.Tensor, position: int, rules: Rules) -> torch.Tensor:
    """Rotary embedding of one head's vector ``[D]``."""
    size = len(vector) if rules.rotated is None else rules.rotated
    out = vector.clone()
    for index in range(size // 2):
        angle = position / rules.slower / rules.theta ** (2 * index / size)
        first, second = (2 * index, 2 * index + 1) if rules.neighbours else (index, index + size // 2)
        a, b = vector[first], vector[second]
        out[first] = a * math.cos(angle) - b * math.sin(angle)
        out[second] = b * math.cos(angle) + a * math.sin(angle)
    return out


def norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def logits(weights: dict[str, torch.Tensor], config: dict[str, Any], ids: list[int]) -> torch.Tensor:
    """Logits ``[T, V]`` of a Llama with PHOTON's attention.

    Args:
        weights: The model's state dict.
        config: Its configuration as a dict.
        ids: Tokens of one sequence.
    """
    weights = {name: tensor.double() for name, tensor in weights.items()}
    hidden = weights["model.embed_tokens.weight"][ids]
    eps = config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        hidden = hidden + attention(own, config, layer, norm(hidden, own["input_layernorm.weight"], eps))
        inner = norm(hidden, own["post_attention_layernorm.weight"], eps)
        gate = torch.nn.functional.silu(inner @ own["mlp.gate_proj.weight"].T)
        hidden = hidden + (gate * (inner @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    hidden = norm(hidden, weights["model.norm.weight"], eps)
    return hidden @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def project(own: dict[str, torch.Tensor], config: dict[str, Any], states: torch.Tensor, rules: Rules):
    """By name q, k, v: ``[T, heads, D]`` of ``states [T, d]``, not rotated."""
    length, size, projected = len(states), config["head_dim"], {}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        flat = states @ own[f"self_attn.{name}_proj.weight"].T + own.get(f"self_attn.{name}_proj.bias", 0)
        if name == "q" and rules.gated:
            flat, projected["gate"] = flat.view(length, heads, 2, size).unbind(2)
            flat = flat.reshape(length, -1)
        projected[name] = flat.view(length, count, size)
        if rules.norms is not None and name != "v":
            projected[name] = rules.norms(projected[name], own[f"self_attn.{name}_norm.weight"])
    projected["q"] = torch.stack([rules.gain(position) * row for position, row in enumerate(projected["q"])])
    return projected


def attention(
    own: dict[str, torch.Tensor], config: dict[str, Any], layer: int, states: torch.Tensor, rules: Rules | None = None
) -> torch.Tensor:
    """One layer's attention to ``states [T, d]``; `own` has the layer's weights in float64."""
    length, size = len(states), config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rules = rules or Rules(config["rope_parameters"]["rope_theta"])
    projected = project(own, config, states, rules)
    chunk, cells = config["chunk_size"], config["memory_cells"].get(layer, [])
    aligns = chunk if config["memory_cells"] else 1
    units = unpacked(own, config, projected, cells) if cells else {}
    out = torch.zeros(length, heads, size, dtype=torch.float64)
    for query in range(length):
        first = max(0, query - config["window"] + 1) // aligns * aligns
        if layer in config["full_attention_layers"]:
            first = 0
        if rules.window is not None:
            first = max(0, query - rules.window + 1)
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            content = projected["q"][query, head]
            scores, values = [], []
            for token in range(query + 1):
                key, value = projected["k"][token, kv_head], projected["v"][token, kv_head]
                if token >= first or (token < config["num_sinks"] and rules.window is None):
                    turned = rotate(content, query, rules) @ rotate(key, token, rules)
                    scores.append(turned)
                    values.append(value)
                elif kv_head in cells:
                    far_key, far_value = units[token]
                    scores.append(content @ far_key[cells.index(kv_head)])
                    values.append(far_value[cells.index(kv_head)])
            scores = torch.stack(scores) * (size**-0.5 if rules.scale is None else rules.scale)
            if rules.softcap is not None:
                scores = rules.softcap * (scores / rules.softcap).tanh()
            if rules.has_sink_logits:
                scores = torch.cat([scores, own["self_attn.sinks"][head : head + 1]])
                values.append(torch.zeros(size, dtype=torch.float64))
            shares = scores.softmax(0)
            out[query, head] = shares @ torch.stack(values)
            if rules.gated:
                out[query, head] *= projected["gate"][query, head].sigmoid()
    return out.view(length, heads * size) @ own["self_attn.o_proj.weight"].T + own.get("self_attn.o_proj.bias", 0)


def stored(vector: torch.Tensor, bits: int) -> torch.Tensor:
    """One head's half of a latent as the cache has it: the nearest of 2^bits levels, odd multiples of half a step."""
    if bits == 16:
        return vector
    step = (vector.abs().max().float() / 2 ** (bits - 1)).to(torch.bfloat16).double()
    levels = [(level + 0.5) * step for level in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
    return torch.stack([min(levels, key=lambda level: abs(level - number)) for number in vector])


def unpacked(own, config, projected, cells) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By token of every complete unit, its far key and value of each cell, ``[m, D]`` each."""
    chunk, size = config["chunk_size"], config["head_dim"]
    count = config["latents_per_unit"]
    half = len(cells) * size
    result = {}
    for begin in range(0, len(projected["k"]) - chunk + 1, chunk):
        members = range(begin, begin + chunk)
        keys = [projected["k"][token, cells].reshape(half) for token in members]
        values = [projected["v"][token, cells].reshape(half) for token in members]
        if count == 1:
            inputs = [torch.cat([part for pair in zip(keys, values, strict=True) for part in pair])]
        else:
            inputs = [torch.cat(keys), torch.cat(values)]
        slots = []
        for number, states in enumerate(inputs):
            name = f"self_attn.memory.{{}}.maps.{number}."
            latent = own[name.format("chunker") + "weight"] @ states + own[name.format("chunker") + "bias"]
            latent = torch.cat([stored(part, config["memory_bits"]) for part in latent.split(size)])
            back = own[name.format("converter") + "weight"] @ latent + own[name.format("converter") + "bias"]
            slots.append(back.view(chunk, -1))
        for place, token in enumerate(members):
            row = torch.cat([part[place] for part in slots])
            result[token] = row[:half].view(-1, size), row[half:].view(-1, size)
    return result
