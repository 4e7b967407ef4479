"""The memory's starting values: the best of their rank, found from the text alone."""

from __future__ import annotations

import pytest
import torch
from tiny import GRAFTS, base_config, photon_model, shake, tokens
from tiny_dense import save_dense
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from photon_train.config import PhotonSettings, RunConfig, TrainSettings
from photon_train.conversion import calibrate as calibrate_module
from photon_train.conversion import latents
from photon_train.conversion.apply import convert
from photon_train.conversion.calibrate import calibrate_directory, calibration_batches
from photon_train.conversion.latents import fit_latents
from photon_train.conversion.presets import make_plan, photon_config
from photon_train.conversion.source import DenseCheckpoint
from photon_train.models import PhotonConfig, PhotonForCausalLM
from photon_train.models.attention_photon import unrotate

HEADS, SIZE = 2, 8  # key-value heads and their dimension; each serves two query heads
FLOOR = 1e-2  # of the mean of what errors count: directions that no query or output shows count as much, beside


# --- an independent reference: what the design asks for, from explicit scores and outputs, in float64 ---


def uneven(name: str, **changes) -> PhotonForCausalLM:
    """A model whose queries and output projections make some dimensions matter far more than others."""
    model = photon_model(name, **changes)
    factors = torch.logspace(-1, 1, SIZE)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(factors.repeat(2 * HEADS)[:, None])
            layer.self_attn.o_proj.weight.mul_(factors.flip(0).repeat(2 * HEADS))
    return model


def dense_twin(model: PhotonForCausalLM) -> LlamaForCausalLM:
    """transformers' own Llama with the weights of `model`."""
    settings = base_config()
    settings.pop("model_type")
    dense = LlamaForCausalLM(LlamaConfig(**settings))
    dense.load_state_dict({key: value for key, value in model.state_dict().items() if ".memory." not in key})
    return dense.eval()


@torch.no_grad()
def projections(model: PhotonForCausalLM, layer: int, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the dense model's projections of `layer` give, before any rotation: ``[B, T, heads, D]`` in float64."""
    dense, found = dense_twin(model), {}
    for name in ("q_proj", "k_proj", "v_proj"):
        dense.model.layers[layer].self_attn.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: found.__setitem__(name, out.unflatten(-1, (-1, SIZE)).double())
        )
    dense(batch)
    return found


def floored(rows: torch.Tensor) -> torch.Tensor:
    """What takes errors ``[heads, D]`` to their effects, ``[heads, n, D]``, and a share of the error itself."""
    share = (FLOOR * rows.square().sum((1, 2)) / SIZE).sqrt()
    return torch.cat([rows, share[:, None, None] * torch.eye(SIZE).double()], dim=1)


def cells_of(model: PhotonForCausalLM, layer: int) -> list[int]:
    return model.config.memory_cells[layer]


class Problem:
    """The fit of one layer: units, and what an error in their keys and values costs.

    A far key meets queries at all distances from the window to the text's end: its error is that of the scores, over
    queries and distances. A value's error is that of the layer's output. Each is taken relative to its variance. Beside
    both, an error counts a hundredth of their mean whatever its direction. The layer's cells alone take part.
    """

    def __init__(self, model: PhotonForCausalLM, layer: int, batches: list[torch.Tensor]) -> None:
        config, found = model.config, projections(model, layer, torch.cat(batches))
        self.memory, self.chunk = model.model.layers[layer].self_attn.memory, config.chunk_size
        cells = cells_of(model, layer)
        length = batches[0].shape[1]
        begin, whole = min(config.window, length // 2), length // self.chunk * self.chunk
        self.keys, self.values = found["k_proj"][:, :whole, cells], found["v_proj"][:, :whole, cells]
        # Query heads of one key head below each other: ``[heads, queries, D]``.
        queries = found["q_proj"][:, begin:].unflatten(2, (HEADS, 2)).permute(2, 0, 1, 3, 4).flatten(1, 3)[cells]
        self.to_scores = torch.linalg.qr(floored(queries / len(queries[0]) ** 0.5)).R
        out = model.model.layers[layer].self_attn.o_proj.weight.double()
        self.to_output = floored(out.unflatten(1, (HEADS, 2, SIZE)).permute(1, 2, 0, 3).flatten(1, 2)[cells])
        self.wanted_keys = self._seen_from_afar(dense_twin(model), range(begin, length))

    def _seen_from_afar(self, dense: LlamaForCausalLM, distances: range) -> torch.Tensor:
        """The mean over the distances of each key, rotated as a query at that distance meets it."""
        total = torch.zeros_like(self.keys)
        for distance in distances:
            # A query at position d and a key at 0: turning the key by -d is the same for their score.
            position = torch.full(self.keys.shape[:2], -distance)
            cosine, sine = dense.model.rotary_emb(self.keys, position)
            total += apply_rotary_pos_emb(*[self.keys.transpose(1, 2)] * 2, cosine, sine)[0].transpose(1, 2)
        return total / len(distances)

    def _costs(self, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values ``[B, T, heads, D]`` as vectors per unit whose squared distances are the costs."""
        costs = []
        for states, matrix in ((keys, self.to_scores), (values, self.to_output)):
            seen = torch.einsum("bthd,hed->bthe", states, matrix).flatten(2)
            costs.append(seen.unflatten(1, (-1, self.chunk)).flatten(2).flatten(0, 1))
        return costs

    def _wanted(self) -> list[torch.Tensor]:
        costs = [cost - cost.mean(0) for cost in self._costs(self.wanted_keys, self.values)]
        return [cost / cost.norm() for cost in costs]

    @torch.no_grad()
    def optimum(self) -> float:
        """The least error of any map through a latent: what singular values beyond its rank leave (Eckart-Young).

        What is wanted is linear in a unit's keys and values, so that without a bound on the rank no error is left.
        """
        wanted = self._wanted()
        groups = [torch.cat(wanted, dim=1)] if self.memory.num_latents == 1 else wanted
        rank = 2 * self.keys.shape[2] * SIZE // self.memory.num_latents
        return sum(float(torch.linalg.svdvals(group)[rank:].square().sum()) for group in groups)

    @torch.no_grad()
    def error(self) -> float:
        """The error of the model's own chunker and converter."""
        latents_, _ = self.memory.pack(*(states.transpose(1, 2).float() for states in (self.keys, self.values)))
        read = [states.transpose(1, 2).double() for states in self.memory.unpack(*latents_)]
        errors = 0.0
        costs = zip(self._costs(*read), self._costs(self.wanted_keys, self.values), strict=True)
        for found, wanted in costs:
            errors += float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
        return errors


TEXT = [tokens(8, 60, seed=seed) for seed in range(4)]


@pytest.mark.parametrize("name", ["memory", "memory-apart", "memory-no-sinks"])
def test_the_fit_is_the_best_of_its_rank(name):
    model = uneven(name)
    problems = {layer: Problem(model, layer, TEXT) for layer in model.config.memory_layers}
    before = [problem.error() for problem in problems.values()]
    names = fit_latents(model, TEXT)
    assert sorted(names) == sorted(key for key, _ in model.named_parameters() if ".memory." in key)
    for problem, start in zip(problems.values(), before, strict=True):
        best = problem.optimum()
        assert 1e-3 < best < 0.5 * start
        assert 0.9999 * best <= problem.error() <= 1.01 * best


@pytest.mark.parametrize(
    ("part", "spoilt"),
    [
        ("_turn", lambda keys, *_: keys),
        ("_weights", lambda model, layer, _: torch.eye(SIZE).double().repeat(2, len(cells_of(model, layer)), 1, 1)),
        ("_floored", lambda counts: counts + 100 * torch.eye(SIZE)),
    ],
)
def test_the_reference_sees_a_fit_that_leaves_out_distances_or_weights(part, spoilt, monkeypatch):
    monkeypatch.setattr(latents, part, spoilt)
    model = uneven("memory")
    problem = Problem(model, 2, TEXT)
    fit_latents(model, TEXT)
    assert problem.error() > 1.1 * problem.optimum()


# --- few bits ---


def unturned(monkeypatch) -> None:
    """Latents in the basis of the regression, its directions scaled alike."""
    monkeypatch.setattr(latents, "_random_rotation", lambda size: torch.eye(size).double())


@pytest.mark.parametrize("size", [1, 16, 96])
def test_the_random_rotation_is_one_and_always_the_same(size):
    turn = latents._random_rotation(size)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size).double())
    assert torch.equal(turn, latents._random_rotation(size))


@pytest.mark.parametrize("name", ["memory", "memory-apart", "memory-many-sinks"])
@torch.no_grad()
def test_the_rotation_changes_no_function(name, monkeypatch):
    turned, plain, ids = uneven(name), uneven(name), tokens(2, 60, seed=9)
    fit_latents(turned, TEXT)
    unturned(monkeypatch)
    fit_latents(plain, TEXT)
    for layer in plain.config.memory_layers:
        one, two = (model.model.layers[layer].self_attn.memory for model in (turned, plain))
        for mine, theirs in zip(one.chunker.maps, two.chunker.maps, strict=True):
            assert (mine.weight - theirs.weight).norm() > 0.5 * theirs.weight.norm()
            torch.testing.assert_close(mine.weight.norm(), theirs.weight.norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(turned(ids).logits, plain(ids).logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["memory", "memory-apart", "memory-no-sinks", "memory-many-sinks"])
def test_latents_in_four_bits_lose_less_when_turned(name, monkeypatch):
    """Of text that the fit has not seen."""

    def errors() -> list[float]:
        model = uneven(name, memory_bits=4)
        problems = [Problem(model, layer, [tokens(8, 60, seed=7)]) for layer in model.config.memory_layers]
        fit_latents(model, TEXT)
        return [problem.error() for problem in problems]

    turned = errors()
    unturned(monkeypatch)
    for mine, theirs in zip(turned, errors(), strict=True):
        assert mine < theirs


@pytest.mark.parametrize("name", ["memory", "memory-apart"])
def test_the_mean_costs_no_bits(name):
    """Latents of the text that was fitted to vary around 0, in every direction by as much as it counts."""
    model = uneven(name, memory_bits=4)
    fit_latents(model, TEXT)
    for layer in model.config.memory_layers:
        problem = Problem(model, layer, TEXT)
        states = torch.stack([problem.keys, problem.values], dim=2).flatten(2).float()
        packed = problem.memory.chunker(states.unflatten(1, (-1, problem.chunk))).flatten(0, 1)
        assert packed.mean(0).abs().max() < 1e-4 * packed.std(0).max()


# --- what else the fit promises ---


@torch.no_grad()
def test_both_maps_have_weights_of_one_size():
    """An optimiser's step has one size: a map of small weights would be overwritten by the first steps."""
    model = uneven("memory")
    fit_latents(model, TEXT)
    for layer in model.config.memory_layers:
        memory = model.model.layers[layer].self_attn.memory
        sizes = [part.maps[0].weight.square().mean().sqrt() for part in (memory.chunker, memory.converter)]
        torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-4, atol=0)


@torch.no_grad()
def test_what_fits_into_the_rank_is_reconstructed_exactly():
    """Where a layer's keys and values are the same for both tokens of a unit, one latent holds both."""
    model = photon_model("memory-apart")
    ids = tokens(16, 30).repeat_interleave(2, dim=1)
    fit_latents(model, [ids])
    found = projections(model, 0, ids)
    memory = model.model.layers[0].self_attn.memory
    packed, _ = memory.pack(*(found[name].transpose(1, 2).float() for name in ("k_proj", "v_proj")))
    _, read = memory.unpack(*packed)
    torch.testing.assert_close(read.transpose(1, 2), found["v_proj"].float(), atol=2e-2, rtol=0)


@pytest.mark.parametrize(("name", "groups"), [("memory", 2), ("memory-apart", 4)])
def test_latents_are_measured_in_as_many_groups_as_memory_asks_for(name, groups, monkeypatch):
    together, apart = photon_model(name), photon_model(name)
    passes, reports = [], []
    for model in (together, apart):
        model.model.register_forward_hook(lambda *_: passes.append(1))
        fit_latents(model, TEXT, lambda *counts: reports.append(counts))
        monkeypatch.setattr("photon_train.accounting.graft._FIT_BYTES", 1)
    assert len(passes) == 4 + groups * 4
    assert reports == [(done, total) for total in (4, groups * 4) for done in range(1, total + 1)]
    for (name, one), two in zip(together.named_parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, two), name


@torch.no_grad()
def test_far_scores_are_as_large_as_near_ones_under_yarn():
    """YaRN multiplies cosines and sines; queries and keys have that factor once, whether rotated or not."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    settings = base_config(rope_parameters=rope)
    config = PhotonConfig(base_model_type=settings.pop("model_type"), **settings, **GRAFTS["memory"])
    whole = shake(PhotonForCausalLM(config))
    position, states = torch.arange(20)[None], torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    factor = whole.model.rotary_emb.attention_scaling
    assert factor > 1.1
    rotated = apply_rotary_pos_emb(states, states, *whole.model.rotary_emb(states, position))[0]
    torch.testing.assert_close(unrotate(rotated, whole.model.rotation(position)), factor * states)
    # What a far query meets is fitted to keys turned by distances alone.
    cosine, sine = latents._mean_rotation(whole, 0, 0, 1)
    torch.testing.assert_close((cosine.flatten(), sine.flatten()), (torch.ones(8), torch.zeros(8)))


def test_text_within_the_window_will_do():
    model = photon_model("memory", window=64)
    fit_latents(model, [tokens(8, 30)])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_long_text_comes_in_small_batches(monkeypatch):
    monkeypatch.setattr(calibrate_module, "_BATCH_TOKENS", 200)
    assert [len(batch) for batch in calibration_batches(Texts())] == [2, 2, 2]
    for tokens_in_all, batches in ((300, [2, 1]), (96, [1]), (50, [1])):
        monkeypatch.setattr(calibrate_module, "_TOKENS", tokens_in_all)
        assert [len(batch) for batch in calibration_batches(Texts())] == batches


class Texts:
    def __len__(self) -> int:
        return 6

    def batch(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.stack([tokens(1, 96, seed=int(index))[0] for index in indices])}


def test_conversion_writes_the_fitted_latents(tmp_path):
    dense = save_dense(tmp_path / "dense")
    photon = PhotonSettings(memory_cells=["0:0", "0:1", "1:1", "2:0", "3:0", "3:1"], window=16)
    settings = RunConfig(photon=photon, train=TrainSettings(seq_len=96))
    checkpoint = DenseCheckpoint.open(str(dense))
    config = photon_config(checkpoint.config, settings)
    plan = make_plan(checkpoint, config)
    batches = calibration_batches(Texts())
    assert [len(batch) for batch in batches] == [4, 2]
    for name, written in (("plain", None), ("fitted", lambda path: calibrate_directory(path, batches))):
        convert(checkpoint, plan, config, tmp_path / name, progress=False, on_written=written)
    plain, fitted = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("plain", "fitted"))
    before, after = (dict(model.named_parameters()) for model in (plain, fitted))
    for name in before:
        assert torch.equal(before[name], after[name]) == (".memory." not in name), name
    ids = tokens(2, 96)
    with torch.no_grad():
        wanted = fitted(ids, as_dense=True).logits
        errors = [(model(ids).logits - wanted).square().mean() for model in (plain, fitted)]
    assert errors[1] < errors[0]
