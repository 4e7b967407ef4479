"""Experts of the families that have them: held stacked in memory, stored one by one (or stacked) in checkpoints.

transformers holds the experts of a layer in two tensors, ``experts.gate_up_proj [E, 2 I, d]`` and
``experts.down_proj [E, d, I]`` (gpt-oss turned round, with biases beside them); checkpoints keep the names that the
family was published with, which serving engines read. What is said here of the names is registered with transformers'
loader, so that a PHOTON checkpoint has them too.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from .configuration_photon import PhotonConfig

HELD = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class Experts:
    """How a family names a layer's experts.

    Attributes:
        block: Name of the layer's mixture in memory; stored_block: in checkpoints.
        router: Name of the router's weight in memory, under the block; stored_router: in checkpoints.
        linears: An expert's gate, up and down projection in checkpoints, each a matrix under ``experts.<number>``.
        stacked: In their place, where checkpoints hold experts stacked: gate and up projections, down projections.
        is_as_held: Whether checkpoints have the names in memory.
    """

    block: str = "mlp"
    stored_block: str = "mlp"
    router: str = "gate.weight"
    stored_router: str = "gate.weight"
    linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked: tuple[str, str] | None = None
    is_as_held: bool = False

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors that a checkpoint holds for one of the model's.

        Args:
            name: A parameter's name in memory; those that are no part of a mixture are stored as they are.
            shape: Its shape.
        """
        prefix, found, within = name.rpartition(f".{self.block}.")
        if self.is_as_held or not found or within not in (*HELD, self.router):
            return {name: shape}
        block = f"{prefix}.{self.stored_block}"
        if within == self.router:
            return {f"{block}.{self.stored_router}": shape}
        if self.stacked is not None:
            return {f"{block}.{self.stacked[HELD.index(within)]}": shape}
        gate, up, down = self.linears
        count, rows, columns = shape
        if within == HELD[1]:
            parts = {f"{down}.weight": (rows, columns)}
        else:
            parts = {f"{part}.weight": (rows // 2, columns) for part in (gate, up)}
        return {f"{block}.experts.{number}.{part}": size for number in range(count) for part, size in parts.items()}

    def conversions(self) -> list[WeightConverter | WeightRenaming]:
        """`stored`, as transformers' loader is told; saving turns it round."""
        if self.is_as_held:
            return []
        block, stored = f"{self.block}.", f"{self.stored_block}."
        gate_up, down = (f"{block}{name}" for name in HELD)
        found: list[WeightConverter | WeightRenaming] = []
        if (block, self.router) != (stored, self.stored_router):
            found.append(_renaming(f"{stored}{self.stored_router}", f"{block}{self.router}"))
        if self.stacked is not None:
            names = (f"{stored}{name}" for name in self.stacked)
            return [*found, *(_renaming(name, to) for name, to in zip(names, (gate_up, down), strict=True))]
        each = [f"{stored}experts.*.{name}.weight" for name in self.linears]
        return [
            *found,
            WeightConverter(each[:2], gate_up, operations=[MergeModulelist(dim=0), Concatenate(dim=1)]),
            WeightConverter(each[2:], down, operations=[MergeModulelist(dim=0)]),
        ]


def _renaming(source: str, target: str) -> WeightRenaming:
    return WeightRenaming(source.replace(".", r"\."), target)


_NAMED = Experts()
# By the family's model_type.
EXPERTS: dict[str, Experts] = {
    "qwen3_moe": _NAMED,
    "olmoe": _NAMED,
    "mixtral": Experts(stored_block="block_sparse_moe", linears=("w1", "w3", "w2")),
    "gpt_oss": Experts(router="router.weight", is_as_held=True),
    "granitemoe": Experts(
        block="block_sparse_moe",
        stored_block="block_sparse_moe",
        router="router.weight",
        stored_router="router.layer.weight",
        stacked=("input_linear.weight", "output_linear.weight"),
    ),
}


def stored_tensors(model_type: str, held: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a checkpoint holds for the tensors of a model.

    Args:
        model_type: Of the dense family.
        held: Name -> shape of the model's parameters.
    """
    experts = EXPERTS.get(model_type)
    if experts is None:
        return held
    return {each: size for name, shape in held.items() for each, size in experts.stored(name, shape).items()}


def saving_conversions(model_type: str) -> list[WeightConverter | WeightRenaming] | None:
    """What `save_pretrained` turns round for a family; None where names in memory and on disk agree."""
    experts = EXPERTS.get(model_type)
    return None if experts is None else experts.conversions()


# All PHOTON models share a model_type, by which the loader looks conversions up: names tell the families apart.
register_checkpoint_conversion_mapping(
    PhotonConfig.model_type,
    [each for experts in dict.fromkeys(EXPERTS.values()) for each in experts.conversions()],
    overwrite=True,
)
