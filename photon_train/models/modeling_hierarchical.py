"""`HierarchicalForCausalLM`: PHOTON as the paper has it (arXiv 2512.20687), made of a dense family's decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .base_photon import BasePreTrainedModel, PhotonGenerationMixin
from .cache_hierarchical import PROTOCOLS, HierarchicalCache
from .configuration_hierarchical import HierarchicalConfig
from .families_photon import family
from .modules_hierarchical import Chunker, Converter, InputScale, Level, StartState, initialize, stack_config
from .pass_hierarchical import HierarchicalPass, consistency_loss
from .rows_photon import Rows, align_rows, has_restarts


@dataclass
class HierarchicalModelOutput(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` and the recursive-consistency term.

    Attributes:
        consistency_loss: Mean of 1 - cos(decoder's prediction of a unit, the unit) over levels >= 2; None with one
            level, and where there is a past.
    """

    consistency_loss: torch.FloatTensor | None = None


@dataclass
class HierarchicalCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and the recursive-consistency term, as in `HierarchicalModelOutput`."""

    consistency_loss: torch.FloatTensor | None = None


class HierarchicalPreTrainedModel(BasePreTrainedModel):
    """Weight initialisation and what transformers needs to know of every hierarchical model."""

    config_class = HierarchicalConfig
    cache_class = HierarchicalCache
    # What layers see is laid out once, for all levels, on one device.
    _no_split_modules = ["HierarchicalModel"]
    _skip_keys_device_placement = ["past_key_values"]

    def _init_weights(self, module: nn.Module) -> None:
        if not initialize(module):
            super()._init_weights(module)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which names in ``auto_map`` only the class that is saved: the base model is added."""
        known = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**known, "AutoModel": f"{__name__.split('.')[-1]}.HierarchicalModel"}
        super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the dense family's configuration, which sets the size at loading, is changed too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.base_config["vocab_size"] = self.config.vocab_size
        return embeddings


class HierarchicalModel(HierarchicalPreTrainedModel):
    """The hierarchy, with the signature and output of a base model of transformers.

    The top level is shifted by one unit (a learned start state stands before the first); levels below are not: what a
    decoder predicts of a unit, having read the units before it in its group, conditions what lies under that unit.

    Attributes:
        backend, fused_windows, protocol: See the setters of `HierarchicalForCausalLM`.
    """

    backend, fused_windows, protocol = "torch", "auto", "hiergen"

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__(config)
        base, classes = stack_config(config), family(config.base_config["model_type"])
        self.embed_tokens = nn.Embedding(base.vocab_size, base.hidden_size, base.pad_token_id)
        self.levels = nn.ModuleList(Level(base, settings) for settings in config.levels)
        self.start = StartState(base.hidden_size)
        self.norm = classes.norm(base.hidden_size, eps=base.rms_norm_eps)
        self.rotary_emb = classes.rotary(config=base)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: HierarchicalCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> HierarchicalModelOutput:
        """States that predict each next token, after the final norm.

        Args:
            input_ids: ``[B, T]``; or `inputs_embeds`, ``[B, T, d]``.
            attention_mask: ``[B, T]`` (with a cache ``[B, cached + T]``), 1 for tokens. Each row counts positions and
                chunks from its own first token; what lies between tokens is left out.
            position_ids: As every row counts them, up to a constant; they follow from `attention_mask`. Where they
                start again at 0, as transformers and TRL write packed batches, another document starts, which is
                computed as if it were alone.
            past_key_values: Cache to go on from (filled in place).
            use_cache: Return a cache; default: ``config.use_cache``, or in training only if one is given.
            **kwargs: What other models take and this one has no use for.

        Raises:
            ValueError: for no tokens, a row without any, a mask that is not 2-D, other position_ids, a cache of another
                kind, packed documents with a cache, `output_attentions` and `output_hidden_states`.
        """
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise ValueError(
                    f"{name} has no meaning for stacks at several rates, which never hold it: leave it out"
                )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None and past_key_values is None and position_ids is not None:
            use_cache = False if has_restarts(position_ids, attention_mask) else None
        cache = self._choose_cache(past_key_values, use_cache)
        if cache is not None and not cache.is_initialized:
            heads, size = self.config.num_key_value_heads, self.config.head_dim
            cache.allocate(len(embeds), heads, size, self._cache_like(embeds), embeds)
        rows = align_rows(attention_mask, position_ids, embeds, cache)
        hidden, consistency = self._feed(rows, rows.gather(embeds), cache)
        if cache is not None:
            cache.advance(rows.columns, rows.lengths, rows.host_lengths)
        return rows.scatter(
            HierarchicalModelOutput(
                last_hidden_state=self.norm(hidden), past_key_values=cache, consistency_loss=consistency
            )
        )

    def _feed(self, rows: Rows, embeds: torch.Tensor, cache: HierarchicalCache | None):
        if rows.documents is not None:
            return self._feed_documents(rows, embeds)
        past, new = rows.host_past, rows.host_lengths
        if not any(new):
            return torch.zeros_like(embeds), None
        if cache is None or cache.protocol == "hiergen" or not rows.has_past or max(new) == 1:
            run = HierarchicalPass(self, cache, past, new, rows.rows)
            return run.feed(embeds), consistency_loss([run])
        if not all(past):
            raise ValueError(
                "protocol 'recgen' reads prompts in a pass of their own: do not mix them with rows that go on"
            )
        # A reconstruction is made of those before it: one token after the other.
        hidden = []
        for column in range(max(new)):
            run = HierarchicalPass(self, cache, past, [int(column < count) for count in new], rows.rows)
            hidden.append(run.feed(embeds[:, column : column + 1]))
            past = [had + (column < count) for had, count in zip(past, new, strict=True)]
        hidden.append(hidden[0].new_zeros(len(new), embeds.shape[1] - max(new), embeds.shape[2]))
        return torch.cat(hidden, dim=1), None

    def _feed_documents(self, rows: Rows, embeds: torch.Tensor):
        groups = rows.documents.groups
        passes = [
            HierarchicalPass(self, None, [0] * len(group.lengths), group.lengths, None, varies=True) for group in groups
        ]
        parts = zip(passes, rows.documents.take_apart(embeds), strict=True)
        hidden = rows.documents.put_together([run.feed(states) for run, states in parts])
        real = [run for run, group in zip(passes, groups, strict=True) if not group.is_empty]
        return hidden, consistency_loss(real)

    def _new_cache(self) -> HierarchicalCache:
        return HierarchicalCache(self.config, self.protocol)


class HierarchicalForCausalLM(HierarchicalPreTrainedModel, PhotonGenerationMixin):
    """The hierarchy with a language-model head; logits i predict token i + 1.

    Works with `generate` (greedy, sampling, beams), Trainer and peft like any causal LM of transformers. Any length is
    accepted, and padding on either side: chunks count from each row's own first token.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # Assisted decoding would have to take chunks apart: transformers then refuses it with a clear message.
    _is_stateful = True
    # The layers of the dense model are divided between encoders and decoders: there is no dense function to distil.
    holds_dense_model = False
    new_module_classes = (Chunker, Converter, StartState, InputScale)

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__(config)
        self.model = HierarchicalModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: HierarchicalCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> HierarchicalCausalLMOutput:
        """Logits, and the loss if `labels` are given.

        Args:
            labels: ``[B, T]``, -100 ignored; shifted inside. In training the loss includes `consistency_weight` times
                the consistency term.
            logits_to_keep: Last columns (or their indices) to compute logits for; 0: all.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs: As for
                `HierarchicalModel.forward`, which says what is raised.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss, consistency = None, out.consistency_loss
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training and consistency is not None and self.config.consistency_weight:
                loss = loss + self.config.consistency_weight * consistency
        return HierarchicalCausalLMOutput(
            loss=loss, logits=logits, past_key_values=out.past_key_values, consistency_loss=consistency
        )

    @property
    def protocol(self) -> str:
        """What new caches feed upward: ``hiergen`` or ``recgen``."""
        return self.model.protocol

    def set_protocol(self, protocol: str) -> None:
        """Choose what new caches feed upward after their first pass: `hiergen` (default) or `recgen` (definition A.3).

        `hiergen` encodes the tokens that were emitted and equals the training forward. `recgen` takes the decoders'
        reconstructions in the place of the encoders' states below the top, so that no lower encoder runs and only the
        top encoder's cache grows. It is here to reproduce the paper and does not compute the same function: with
        isolated chunks, which tokens are emitted has no influence on any later top unit; with a stream, only through
        the window. A model whose lower encoders have a window (the default) has the same growing cache with `hiergen`.
        The prompt (a cache's first pass) is encoded in full by either.

        Raises:
            ValueError: for another name, and for `recgen` on a model of one level, which reconstructs nothing.
        """
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
        if protocol == "recgen" and self.config.num_levels < 2:
            raise ValueError("protocol 'recgen' needs at least two levels: use 'hiergen'")
        self.model.protocol = protocol

    def new_cache(self, **settings: Any) -> HierarchicalCache:
        """An empty cache; settings as for `HierarchicalCache`."""
        return HierarchicalCache(self.config, **{"protocol": self.model.protocol, **settings})

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs: Any) -> dict[str, Any]:
        # transformers takes embeddings for the prompt only where this signature names them.
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
