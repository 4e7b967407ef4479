"""The hierarchical model's function, written from the paper's and the design's words: float64, loops, no shared code.

Llama layers only. One sequence, no cache, everything computed anew.
"""

from __future__ import annotations

import math

import torch


class Reference:
    """Computes the logits of one sequence.

    Args:
        config: Of the model: levels, layout, window, num_sinks, and the sizes of the dense family.
        weights: Its state dict.
    """

    def __init__(self, config, weights: dict[str, torch.Tensor]) -> None:
        self.config, self.weights = config, {name: t.double() for name, t in weights.items()}

    def logits(self, ids: list[int]) -> torch.Tensor:
        """``[T, V]``; row i predicts token i + 1."""
        embeds = [self.weights["model.embed_tokens.weight"][token] for token in ids]
        outputs = self.token_outputs(embeds, self.bottom_up(embeds))
        weight, norm = self.weights["lm_head.weight"], self.weights["model.norm.weight"]
        return torch.stack([weight @ self.rms(state, norm) for state in outputs])

    # --- bottom-up: complete chunks become units ---

    def bottom_up(self, embeds):
        """States by level: tokens' embeddings, then the encoders' states of the complete units."""
        states = [embeds]
        for index in range(len(self.config.levels)):
            states.append(self.encode(index, states[-1]))
        return states

    def encode(self, index, below):
        """The encoder's states of the complete units of a level."""
        level, name = self.config.levels[index], f"model.levels.{index}"
        matrix, scale = self.weights[f"{name}.chunker.proj.weight"], self.weights[f"{name}.chunker.scale"]
        size = level["chunk_size"]
        units = [scale * (matrix @ torch.cat(below[u * size : u * size + size])) for u in range(len(below) // size)]
        reach = level["encoder_window"] or len(units)
        sees = [[k for k in range(len(units)) if u - reach < k <= u] for u in range(len(units))]
        return self.stack(f"{name}.encoder", units, list(range(len(units))), sees)

    # --- top-down: what comes next is predicted level by level ---

    def token_outputs(self, embeds, states):
        """What predicts each next token, before the norm; ``states[l]`` are the units of level l, 0 the tokens."""
        conditions = self.conditions(states)[0]
        if self.config.layout == "stream":
            return self.stream_outputs(conditions, embeds)
        return self.isolated_predictions(0, conditions, embeds)[1 : len(embeds) + 1]

    def conditions(self, states):
        """By level, what each group's slots are made of: the top unit before it, below what the decoder above makes."""
        top = len(self.config.levels)
        conditions = [None] * (top - 1) + [[self.weights["model.start.state"], *states[top]]]
        for index in reversed(range(1, top)):
            conditions[index - 1] = self.isolated_predictions(index, conditions[index], states[index])
        return conditions

    def consistency(self, ids: list[int]) -> torch.Tensor:
        """Mean over levels and units of 1 - cos between a unit and what the decoder above makes of it."""
        states, terms = self.bottom_up([self.weights["model.embed_tokens.weight"][token] for token in ids]), []
        for index, predicted in enumerate(self.conditions(states)[:-1]):
            units = states[index + 1]
            cosines = [p @ u / (p.norm() * u.norm()) for p, u in zip(predicted, units, strict=False)]
            terms.append(1 - torch.stack(cosines).mean())
        return torch.stack(terms).mean()

    def slots(self, index, condition):
        name = f"model.levels.{index}.converter"
        return (self.weights[f"{name}.scale"] * (self.weights[f"{name}.proj.weight"] @ condition)).split(len(condition))

    def isolated_predictions(self, index, conditions, children):
        """The decoder's prediction of each child, and of the one after the last, from the group's earlier ones."""
        size, name = self.config.levels[index]["chunk_size"], f"model.levels.{index}.decoder"
        scale, predictions = self.weights[f"{name}.input_scale.weight"], []
        for group, condition in enumerate(conditions):
            slots = list(self.slots(index, condition))
            inside = children[group * size : group * size + size]
            for place in range(min(len(inside), size - 1) + 1):
                sequence = slots + [scale * child for child in inside[:place]]
                sees = [list(range(e + 1)) for e in range(len(sequence))]
                predictions.append(self.stack(name, sequence, list(range(len(sequence))), sees)[-1])
        return predictions

    def stream_outputs(self, conditions, embeds):
        """One sequence: before each chunk's tokens its slots, which stand where the chunk's first token does."""
        size, name = self.config.levels[0]["chunk_size"], "model.levels.0.decoder"
        scale, sequence, positions, is_token = self.weights[f"{name}.input_scale.weight"], [], [], []
        for token, embed in enumerate(embeds):
            if token % size == 0:
                slots = self.slots(0, conditions[token // size])
                sequence, positions = sequence + list(slots), positions + [token] * len(slots)
                is_token += [False] * len(slots)
            sequence, positions, is_token = [*sequence, scale * embed], [*positions, token], [*is_token, True]
        places = [e for e in range(len(sequence)) if is_token[e]]
        last_sink = places[min(self.config.num_sinks, len(places)) - 1] if self.config.num_sinks else -1
        sees = [
            [k for k in range(e + 1) if positions[k] > positions[e] - self.config.window or k <= last_sink]
            for e in range(len(sequence))
        ]
        outputs = self.stack(name, sequence, positions, sees)
        return [outputs[e] for e in places]

    # --- Llama ---

    def stack(self, name, states, positions, sees):
        """Decoder layers on a list of states; state e attends to the states ``sees[e]``."""
        layer = 0
        while f"{name}.layers.{layer}.input_layernorm.weight" in self.weights:
            states = self.layer(f"{name}.layers.{layer}.", states, positions, sees)
            layer += 1
        return states

    def layer(self, name, states, positions, sees):
        def weight(suffix):
            return self.weights[f"{name}{suffix}.weight"]

        config, out = self.config, []
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        queries, keys, values = [], [], []
        for state, position in zip(states, positions, strict=True):
            normed = self.rms(state, weight("input_layernorm"))
            query, key, value = (weight(f"self_attn.{kind}_proj") @ normed for kind in "qkv")
            queries.append([self.rotate(head, position) for head in query.split(dim)])
            keys.append([self.rotate(head, position) for head in key.split(dim)])
            values.append(value.split(dim))
        for e, state in enumerate(states):
            read = []
            for head in range(heads):
                of = head // (heads // kv_heads)
                scores = torch.stack([keys[k][of] for k in sees[e]]) @ queries[e][head] / math.sqrt(dim)
                read.append(scores.softmax(0) @ torch.stack([values[k][of] for k in sees[e]]))
            state = state + weight("self_attn.o_proj") @ torch.cat(read)
            normed = self.rms(state, weight("post_attention_layernorm"))
            gate, up = weight("mlp.gate_proj") @ normed, weight("mlp.up_proj") @ normed
            out.append(state + weight("mlp.down_proj") @ (gate * torch.sigmoid(gate) * up))
        return out

    def rms(self, state, weight):
        return weight * state / torch.sqrt(state.pow(2).mean() + self.config.base_config.get("rms_norm_eps", 1e-6))

    def rotate(self, head, position):
        half = len(head) // 2
        angles = position / 10000.0 ** (torch.arange(half, dtype=torch.float64) / half)
        first, second = head[:half], head[half:]
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine])
