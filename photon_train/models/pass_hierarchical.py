"""One pass of new tokens through the hierarchy, over what the cache holds of earlier ones.

Bottom-up, chunkers and encoders make the units that the new tokens complete; top-down, converters and decoders predict
what lies under the next unit, down to the next token. Training has no cache, prefill any number of tokens per row,
decoding one: then the levels in which no row completes a chunk do nothing, and the others work on those rows alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .attention_photon import NewElements, load_kernels
from .cache_hierarchical import HierarchicalCache
from .plan_hierarchical import Elements, LevelPlan
from .segments_photon import FullSegment, WindowSegment


class HierarchicalPass:
    """A pass of some new tokens of every row.

    Args:
        model: The hierarchy, a `HierarchicalModel`.
        cache: Holds what came before, and is filled; None: nothing did, and nothing is kept.
        past, new: Tokens that each row has and gets, on the host.
        rows: Rows of the cache, ``[B]``; None: all, in order.
        varies: Whether the rows are documents, of which other processes may have longer or shorter ones.

    Attributes:
        consistency: Per level below the top, the sum of 1 - cos between units as the decoder above predicts them and as
            they are, and how many there are, once `feed` has run without a past.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: HierarchicalCache | None,
        past: list[int],
        new: list[int],
        rows: torch.Tensor | None,
        varies: bool = False,
    ) -> None:
        self.model, self.config, self.levels, self.cache = model, model.config, model.levels, cache
        self.rows, self.batch, self.varies = rows, len(past), varies
        self.has_past = any(past)
        begins = any(more and not had for had, more in zip(past, new, strict=True))
        self.single = cache is not None and max(new) == 1 and not begins
        self.plans = self._plan(torch.tensor(past), torch.tensor(new))
        self.consistency: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _plan(self, past: torch.Tensor, new: torch.Tensor) -> list[LevelPlan]:
        """One plan per level, from the lowest up, as far as anything is new."""
        least = int(self.cache is None and (torch.is_grad_enabled() or self.varies))
        rows, width, plans = new.nonzero()[:, 0], int(new.max()), []
        for index in range(self.config.num_levels):
            stop = (past + new)[rows]
            stream, unit_tokens = self.config.slot_stream(index), self.config.unit_tokens(index)
            plan = LevelPlan(stream, unit_tokens, rows, past[rows], stop, width, self.single, least)
            plans.append(plan)
            rows, width = plan.closing_rows, plan.num_units
            if not len(rows):
                break
        return plans

    def feed(self, embeds: torch.Tensor) -> torch.Tensor:
        """States that predict the token after each new one, before the final norm.

        Args:
            embeds: Embeddings, ``[B, T, d]``; of row b the first ``new[b]`` are new tokens.

        Returns:
            ``[B, T, d]``, zeros where there is no token.
        """
        self.device = embeds.device
        lowest, columns = self.plans[0], embeds.shape[1]
        children, tables = self._of_rows(embeds, lowest.rows)[:, : lowest.num_children], []
        for index, plan in enumerate(self.plans):
            tables.append(children)
            children = self._ascend(index, plan, children)
        slots = None
        if len(self.plans) == self.config.num_levels and len(self.plans[-1].closing):
            slots = self._convert(len(self.plans) - 1, self._top_conditions(children))
        for index in reversed(range(len(self.plans))):
            outputs = self._decode(index, slots, tables[index])
            if index:
                conditions = self._take(outputs, self.plans[index].predictions(self.plans[index - 1]))
                if not self.has_past:
                    self.consistency[index] = self._consistency(index, conditions, tables[index])
                slots = self._convert(index - 1, conditions)
        hidden = F.pad(self._take(outputs, lowest.next_tokens()), (0, 0, 0, columns - lowest.num_children))
        if len(lowest.rows) == self.batch:
            return hidden
        return hidden.new_zeros(self.batch, columns, hidden.shape[2]).index_copy(0, self._send(lowest.rows), hidden)

    # --- bottom-up ---

    def _ascend(self, index: int, plan: LevelPlan, children: torch.Tensor) -> torch.Tensor | None:
        """States of the new units, ``[m, U, d]``; None if no row completes or opens any."""
        if self.single:
            self._keep(index, plan, children)
            return self._complete(index, plan) if len(plan.closing) else None
        if not len(plan.closing):
            self._keep(index, plan, children)
            return None
        if not plan.num_units:
            states = children.new_zeros(len(plan.closing), 0, children.shape[2])
        else:
            table = [children]
            if plan.has_open:
                table = [self._open_children(index, plan.closing_rows, children), children]
            summary = self.levels[index].chunker(self._take(torch.cat([t.flatten(0, 1) for t in table]), plan.chunks()))
            states = self._encode(index, summary, self._elements(plan.units, plan.closing_rows, bool(plan.unit.any())))
        self._keep(index, plan, children)
        return states

    def _complete(self, index: int, plan: LevelPlan) -> torch.Tensor:
        """The unit that the new child of each closing row completes, ``[m, 1, d]``."""
        rows = self._cache_rows(plan.closing_rows)
        if self.cache.protocol == "recgen" and index + 1 < self.config.num_levels:
            return self.cache.conditions[index][rows][:, None]
        return self._run(self._close, index, rows, self._send(plan.unit[plan.closing]))[:, None]

    def _close(self, index: int, rows: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """Chunk and encode what lies in the open chunk of `rows`, as their ``unit [m]``; its states, ``[m, d]``."""
        chunker, held = self.levels[index].chunker, self.cache.open[index]
        if self.model.backend == "triton":
            kernels = load_kernels()
            summary = kernels.gather_chunk_project(held, rows, chunker.proj.weight, chunker.scale, backend="triton")
        else:
            summary = chunker(held[rows])
        new = NewElements(len(rows), unit[:, None], rows=rows, has_past=True, backend=self.model.backend)
        return self._encode(index, summary[:, None], new)[:, 0]

    def _encode(self, index: int, summary: torch.Tensor, new: NewElements) -> torch.Tensor:
        """Run the encoder of a level on ``summary [m, U, d]``."""
        window, plan = self.config.levels[index]["encoder_window"], self.plans[index]
        store = None if self.cache is None else self.cache.encoders[index]
        if window is None:
            # At fixed shapes what is computed must not depend on lengths.
            is_static = self.cache is not None and self.cache.run is not None
            segment = FullSegment(new, store, None if is_static else int(plan.unit_stop[plan.closing].max()))
        else:
            start, fused = new.index - window + 1, self.model.fused_windows
            segment = WindowSegment(new, start, window - 1, ring=store, fused=fused)
        return self.levels[index].encoder(summary, self.model.rotary_emb(summary, new.index), segment)

    def _keep(self, index: int, plan: LevelPlan, children: torch.Tensor) -> None:
        """Store the new children of the open chunks."""
        if self.cache is None or not plan.num_children:
            return
        row, slot, where = plan.kept()
        held, rows, slot = self.cache.open[index], self._cache_rows(plan.rows[row]), self._send(slot)
        states = children.flatten(0, 1)[self._send(where)].detach().to(held.dtype)
        if self.model.backend == "triton" and self.single:
            kernels = load_kernels()
            append = kernels.Append(states[:, None, None], held[:, None], rows, slot[:, None])
            kernels.cache_append([append], backend="triton")
        else:
            held[rows, slot] = states

    # --- top-down ---

    def _top_conditions(self, states: torch.Tensor) -> torch.Tensor:
        """What the new groups of the top level are made of: the unit before each, or the start state."""
        taken = self.plans[-1].top_conditions()
        if taken is None:
            return states
        start = self.model.start().to(states.dtype).expand(len(states), 1, -1)
        return self._take(torch.cat([start, states], dim=1), taken)

    def _convert(self, index: int, conditions: torch.Tensor) -> torch.Tensor | None:
        """Slots of the new groups of a level, ``[m, G, R, d]``, of ``conditions [m, G, d]``; None if there are none."""
        plan = self.plans[index]
        if not len(plan.closing):
            return None
        if self.cache is not None and self.cache.protocol == "recgen" and index + 1 < self.config.num_levels:
            last = (plan.group_stop - plan.group)[plan.closing] - 1 + torch.arange(len(conditions)) * plan.num_groups
            held = self.cache.conditions[index]
            rows = self._cache_rows(plan.closing_rows)
            held[rows] = conditions.flatten(0, 1)[self._send(last)].detach().to(held.dtype)
        return self.levels[index].converter(conditions)

    def _decode(self, index: int, slots: torch.Tensor | None, children: torch.Tensor) -> torch.Tensor:
        """Outputs of the decoder of a level at the new elements, ``[n, T, d]``, or ``[elements, 1, d]`` one by one."""
        plan = self.plans[index]
        states = [self.levels[index].decoder.input_scale(children).flatten(0, 1)]
        if slots is not None:
            states = [slots.flatten(0, 2), *states]
        hidden = self._take(torch.cat(states), plan.sequence())
        if not self.single:
            new = self._elements(plan.elements, plan.rows, bool(plan.element.any()))
            return self._run_decoder(index, hidden, new)
        # At fixed shapes every element names its row.
        find_rows = self._store_rows if self.cache.run is None else self._cache_rows
        rows = find_rows(plan.row_of_element)
        element = self._send(plan.elements.index[:, 0])
        return self._run(self._feed, index, rows, element, hidden[:, 0])[:, None]

    def _feed(self, index: int, rows: torch.Tensor | None, element: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Feed elements one by one, ``element [n]`` of ``rows [n]`` each; `states` and outputs are ``[n, d]``."""
        new = NewElements(len(states), element[:, None], rows=rows, has_past=True, backend=self.model.backend)
        return self._run_decoder(index, states[:, None], new)[:, 0]

    def _run_decoder(self, index: int, hidden: torch.Tensor, new: NewElements) -> torch.Tensor:
        stream = self.config.slot_stream(index)
        segment = WindowSegment(
            new,
            stream.start(new.index),
            stream.reach,
            stream.period,
            stream.num_sinks,
            None if self.cache is None else self.cache.decoders[index],
            self.model.fused_windows,
        )
        rotary = self.model.rotary_emb(hidden, stream.position(new.index))
        return self.levels[index].decoder(hidden, rotary, segment)

    def _consistency(self, index: int, predicted: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Sum of 1 - cos between units as the decoder above predicts them and as they are, and their number."""
        plan = self.plans[index]
        distance = 1 - F.cosine_similarity(predicted[:, : plan.num_children].float(), states.float(), dim=-1)
        real = torch.arange(plan.num_children) < plan.child_stop[:, None]
        real = self._send(real)
        return (distance * real).sum(), real.sum()

    # --- rows and tables ---

    def _run(self, part, index: int, rows: torch.Tensor | None, *tensors: torch.Tensor) -> torch.Tensor:
        run = self.cache.run
        return part(index, rows, *tensors) if run is None else run(part, index, rows, *tensors)

    def _elements(self, elements: Elements, rows: torch.Tensor, has_past: bool) -> NewElements:
        index, valid = self._send(elements.index), elements.valid
        return NewElements(
            len(rows),
            index,
            base=int(elements.index[0, 0]) if len(index) == 1 else None,
            valid=None if valid is None else self._send(valid),
            rows=self._store_rows(rows),
            has_past=has_past,
            backend=self.model.backend,
        )

    def _send(self, index: torch.Tensor) -> torch.Tensor:
        return index.to(self.device, non_blocking=True)

    def _take(self, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """States of a table ``[..., d]``, ``index.shape + [d]``; zeros where the index is -1."""
        table = table.flatten(0, -2)
        if bool((index < 0).any()):
            index = torch.where(index < 0, len(table), index)
            table = F.pad(table, (0, 0, 0, 1))
        return table.index_select(0, self._send(index.flatten())).unflatten(0, index.shape)

    def _of_rows(self, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return states if len(rows) == self.batch else states.index_select(0, self._send(rows))

    def _cache_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the cache, of ``rows [m]`` of the pass."""
        rows = self._send(rows)
        return rows if self.rows is None else self.rows[rows]

    def _store_rows(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The same for stores, which read all rows in order without a copy: None."""
        if self.cache is None or (len(rows) == self.batch and bool((rows == torch.arange(self.batch)).all())):
            return self.rows
        return self._cache_rows(rows)

    def _open_children(self, index: int, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self.cache.open[index][self._cache_rows(rows)].to(like.dtype)


def consistency_loss(passes: list[HierarchicalPass]) -> torch.Tensor | None:
    """Mean over levels of their mean of 1 - cos (recursive consistency), over rows of several passes; None without."""
    levels = {index for each in passes for index in each.consistency}
    if not levels:
        return None
    terms = []
    for index in sorted(levels):
        sums, counts = zip(*(each.consistency[index] for each in passes if index in each.consistency), strict=True)
        terms.append(sum(sums) / sum(counts).clamp(min=1))
    return torch.stack(terms).mean()
