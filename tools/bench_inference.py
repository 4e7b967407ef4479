"""Decode with PHOTON's engine and with a dense model of the same shapes, in one process, and write the ratios.

python tools/bench_inference.py --profile cpu            # small shapes; then prefill at SmolLM2's shape; ratios only
python tools/bench_inference.py --profile gpu --shape 1b # Llama-3.2-1B shapes, random weights, bf16

A prompt is encoded once; its cache is copied to every row of the batch (PHOTON: its own blocks in each row, except in
mode `multi-query`, where the continuations share them). On a CPU all systems then decode in turns of a few tokens, so
that other work on the machine slows them alike, and the CPU time of one thread is taken; on a GPU each is measured
alone, with the whole memory. Before anything is timed, every system's logits are compared with one pass over the whole
text. On a CPU the prefill of long prompts follows (`prefill` in the result), also in turns: a graft's over the dense
model's; how long it will take is said beforehand.

`decode_ratio` is a system's decoded tokens per second over those of the fastest dense model with full attention
(dynamic or static cache under transformers' `generate`, not compiled; `dense-engine`: PHOTON's own engine), the median
over the turns; `ratios` has the other figures over that model's. `batches` is `equal`, or `best`: the largest power of
two of rows that fits (at most 1024). End-to-end `tokens_per_s` counts one encoding per row (one in all for
`multi-query`) and `new_tokens` of an answer.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from lib import baselines
from lib.cases import CASES, NEW_TOKENS, PREFILLS, Case
from lib.plots import plot_inference
from lib.prefill import PrefillBench
from lib.shapes import SHAPES, SYSTEMS, dense_shape, photon_shape
from lib.systems import DenseSystem, PhotonSystem, System, copy_bandwidth
from lib.vllm_system import VllmSystem
from photon_train.cli import main_wrapper
from photon_train.conversion.presets import target_of
from photon_train.errors import PhotonError
from photon_train.evaluation.report import write_rows

TRANSFORMERS = ("dense-dynamic", "dense-static")
FULL = (*TRANSFORMERS, "dense-engine")  # full attention: what ratios refer to
GIB = 2**30
MOST_ROWS = 1024
MEMORY_SHARE = 0.9  # of a GPU's, for weights and cache; the rest is for activations


class Bench:
    """What is measured with which weights, and the rows so far."""

    def __init__(self, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        self.options, self.device, self.dtype = options, device, dtype
        cases = [] if options.no_decode else CASES[options.profile]
        self.cases = [case for case in cases if options.only in (None, case.context)]
        self.prefill = self._prefill()
        self.began = time.perf_counter()
        self.until = self.began + options.budget_seconds
        self.measured: list[tuple[Case, dict[str, Any], list[float]]] = []
        self.record: dict[str, Any] = {"shape": options.shape, "window": options.window, "backend": options.backend}
        gpu = device.type == "cuda"
        self.record |= {"claims": "absolute and ratios" if gpu else "ratios only"}
        self.record |= {"clock": "wall time" if gpu else "CPU time of one thread"}
        self.record |= {"order": options.order, "cuda_graphs": options.cuda_graphs, "relative_errors": {}}
        self.record |= {"copy_bytes_per_s": copy_bandwidth(device), "skipped": []}
        self.output = options.output or Path(f"benchmarks/inference/{options.profile}-{options.shape}.json")

    # --- systems ---

    def groups(self) -> list[Callable[[], list[System]]]:
        """Systems that share weights, built when they are asked for; the dense model first."""
        photon = [lambda name=name: [self._photon(name)] for name in self.options.presets]
        # vLLM last: it does not give its memory back.
        return [self._dense, *photon, *([self._vllm] if self.options.vllm else [])]

    def _vllm(self) -> list[System]:
        return [VllmSystem(self._place(lambda: LlamaForCausalLM(dense_shape(self.options.shape))))]

    def _dense(self) -> list[System]:
        config = dense_shape(self.options.shape)
        model, encoded = self._place(lambda: LlamaForCausalLM(config)), {}
        kinds = [kind for kind in self.options.dense if baselines.available(kind, model)]
        settings = (model, self.options.window, encoded, self.options.longest_encoding)
        return [DenseSystem(kind, *settings) for kind in kinds]

    def _photon(self, name: str) -> System:
        config = photon_shape(dense_shape(self.options.shape), name, self.options.window)
        model = self._place(lambda: target_of(config).model(config))
        model.set_backend(self.options.backend)
        return PhotonSystem(name, model, self.options.cuda_graphs)

    def _place(self, build: Callable[[], Any]) -> Any:
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                model = build().eval()
        finally:
            torch.set_default_dtype(default)
        model.generation_config.eos_token_id = None
        return model

    def check(self, system: System) -> None:
        """Compare a system's logits with one pass over the whole text.

        Raises:
            PhotonError: if they differ by more than rounding.
        """
        ids = torch.randint(3, 1000, (1, 310), generator=torch.Generator().manual_seed(1)).to(self.device)
        errors = self.record["relative_errors"]
        errors[system.name] = error = system.check(ids, 270)
        # Random weights of a deep model make much of a rounding: what it does to the dense model is the measure.
        rounding = (
            0.0
            if self.dtype != torch.bfloat16
            else 2.5 * max((errors[name] for name in TRANSFORMERS if name in errors), default=0.02)
        )
        if not error < max(system.tolerance, rounding) or error > 0.2:
            raise PhotonError(f"{system.name} computes something else: relative error {error:.2g}")
        print(f"{system.name}: relative error {error:.1g}", flush=True)

    def _prefill(self) -> PrefillBench | None:
        """The prefill of the profile, after its check; says how long it will take."""
        case = None if self.options.no_prefill else PREFILLS.get(self.options.profile)
        if case is None:
            return None
        contexts = tuple(context for context in case.contexts if self.options.only in (None, context))
        if not contexts:
            return None
        bench = PrefillBench(replace(case, contexts=contexts, layers=self.options.prefill_layers or case.layers))
        bench.check()
        times = " and ".join(f"{context:,}" for context in contexts)
        minutes = bench.expected_seconds() / 60
        print(f"prefill: {case.turns} turns of {times} tokens will take {minutes:.1f} CPU minutes", flush=True)
        return bench

    # --- the two orders ---

    def run_in_turns(self) -> None:
        """All systems at a time, case by case."""
        systems = [system for build in self.groups() for system in build()]
        for system in systems:
            self.check(system)
        for case in self.cases:
            if not self._is_late(case) and case.batch is not None:
                try:
                    for row, rates in self._in_turns(case, systems):
                        self.measured.append((case, row, rates))
                finally:
                    self._free(systems)
                self.write()

    def run_alone(self) -> None:
        """One system at a time; its cache has the memory that its weights leave."""
        groups = self.groups()
        for number, build in enumerate(groups):
            # Each group has its share of the time that is left: a slow one does not take the others'.
            left = self.began + self.options.budget_seconds - time.perf_counter()
            self.until = time.perf_counter() + left / (len(groups) - number)
            systems = build()
            for system in systems:
                self.check(system)
            for case in self.cases:
                for system in systems:
                    if not self._is_late(case, system):
                        self._run_one(case, system)
                self.write()
            del system
            systems.clear()
            self._free([])

    def _run_one(self, case: Case, system: System) -> None:
        row, rates = self._alone(case, system)
        if row is None:
            self.record["skipped"].append(vars(case) | {"system": system.name, "reason": "out of memory"})
        else:
            self.measured.append((case, row, rates))

    def _is_late(self, case: Case, system: System | None = None) -> bool:
        if time.perf_counter() < self.until:
            return False
        name = system and system.name
        self.record["skipped"].append(vars(case) | {"system": name, "reason": "the time was up"})
        return True

    def _in_turns(self, case: Case, systems: list[System]) -> Iterator[tuple[dict[str, Any], list[float]]]:
        first, turns = {}, {system.name: [] for system in systems}
        for system in systems:
            first[system.name] = self._prepare(case, system)
        for _ in range(case.turns):
            for system in systems:
                turns[system.name].append(system.decode(steps_of(system, case)))
        for system in systems:
            yield self._row(system, case, first[system.name], turns[system.name], None)

    def _alone(self, case: Case, system: System) -> tuple[dict[str, Any] | None, list[float]]:
        batch = case.batch or self._most_rows(case, system)
        while batch:
            try:
                return self._at_batch(replace(case, batch=batch), system)
            except torch.cuda.OutOfMemoryError:
                batch = 0 if case.batch else batch // 2
            finally:
                self._free([system])
        return None, []

    def _at_batch(self, case: Case, system: System) -> tuple[dict[str, Any], list[float]]:
        seconds = self._prepare(case, system)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        turns = [system.decode(steps_of(system, case)) for _ in range(case.turns)]
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return self._row(system, case, seconds, turns, peak)

    def _prepare(self, case: Case, system: System) -> float | None:
        generator = torch.Generator().manual_seed(case.context)
        prompt = torch.randint(3, system.model.config.vocab_size, (1, case.context), generator=generator)
        steps = steps_of(system, case)
        # On a GPU every part of a step has run twice before its graph is there.
        warm = max(steps, 2 * system.period) if self.device.type == "cuda" else steps
        room = steps * case.turns + warm + 1
        seconds = system.prepare(prompt.to(self.device), case.batch, room, case.mode == "multi-query")
        system.decode(warm)
        return seconds

    def _most_rows(self, case: Case, system: System) -> int:
        memory = torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else 2**30
        # A dynamic cache copies a layer when it grows.
        row = 1.1 * system.bytes_at(case.context + steps_of(system, case) * (case.turns + 2))
        fitting = int((MEMORY_SHARE * memory - system.weights_bytes()) / row)
        most = MOST_ROWS if self.device.type == "cuda" else 4
        return 1 << max(0, min(fitting, most).bit_length() - 1)

    def _free(self, systems: list[System]) -> None:
        for system in systems:
            system.close()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- results ---

    def _row(
        self, system: System, case: Case, first: float | None, turns: list[list[float]], peak: int | None
    ) -> tuple[dict[str, Any], list[float]]:
        """A row, and the tokens per second of every turn."""
        rates = [case.batch * len(steps) / sum(steps) for steps in turns]
        decode, latencies = statistics.median(rates), sorted(step for steps in turns for step in steps)
        encodings = first and first * (1 if case.mode == "multi-query" else case.batch)
        new, kv, weights = NEW_TOKENS.get(case.mode, 256), system.kv_bytes(), system.weights_bytes()
        per_sequence, photon = system.bytes_at(case.context), isinstance(system, PhotonSystem)
        # Shared pages are read once or many times, as the hardware's caches have it.
        shared = case.mode == "multi-query" and photon
        read = None if shared else system.step_bytes(case.context, case.batch) * decode / case.batch
        row = {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "mode": case.mode,
            "context": case.context,
            "batches": "equal",
            "batch": case.batch,
            "system": system.name,
            "tokens_per_s": encodings and case.batch * new / (encodings + case.batch * new / decode),
            "new_tokens": new,
            "decode_tokens_per_s": decode,
            "ttft_s": first,
            "inter_token_s_by_phase": by_phase(system, turns) if case.batch == 1 and photon else None,
            "kv_bytes": kv,
            "kv_bytes_per_sequence": per_sequence,
            "kv_growing_bytes_per_token": system.growing_per_token(),
            "kv_constant_bytes": system.bytes_at(0),
            "weights_bytes": weights,
            "peak_bytes": peak,
            "tpm_kv": decode / (kv / GIB),
            "tpm_kv_sequence": decode / (per_sequence / GIB),
            "tpm_total": decode / ((peak or weights + kv) / GIB),
            "read_bytes_per_s": read,
            "bandwidth_share": read and read / self.record["copy_bytes_per_s"],
        }
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            row[f"inter_token_s_{name}"] = latencies[min(len(latencies) - 1, int(share * len(latencies)))]
        return row, rates

    def rows(self) -> list[dict[str, Any]]:
        """All rows, with the ratios to the faster dense model of the same case."""
        found = []
        for case, row, rates in self.measured:
            same = [(other, its) for its_case, other, its in self.measured if its_case == case]
            dense = [pair for pair in same if pair[0]["system"] in FULL]
            best = max(dense, key=lambda pair: pair[0]["decode_tokens_per_s"], default=None)
            extra = {"batches": "equal" if case.batch else "best", "decode_ratio": None}
            found.append(row | extra | (ratios(row, rates, *best) if best else {}))
        return found

    def write(self) -> None:
        """Write what there is so far."""
        prefill = {"prefill": self.prefill.record()} if self.prefill else {}
        write_rows(self.output, self.rows(), **self.record, **prefill)


def ratios(row: dict, rates: list[float], dense: dict, dense_rates: list[float]) -> dict[str, Any]:
    """A row's figures over those of the dense model."""
    each = [mine / other for mine, other in zip(rates, dense_rates, strict=True)]
    names = ("tokens_per_s", "ttft_s", "inter_token_s_p50", "inter_token_s_p99", "kv_bytes_per_sequence")
    names += ("kv_growing_bytes_per_token", "tpm_kv", "tpm_kv_sequence", "tpm_total")
    over = {name: row[name] / dense[name] if row[name] is not None and dense[name] else None for name in names}
    return {"decode_ratio": statistics.median(each), "decode_ratio_min": min(each), "ratios": over}


def steps_of(system: System, case: Case) -> int:
    """Decoding steps of a turn: whole periods, so that every step's work is in it in due proportion."""
    return math.ceil(case.steps / system.period) * system.period


def by_phase(system: PhotonSystem, turns: list[list[float]]) -> list[float]:
    """Median seconds of a token by its place in the largest unit, of one row."""
    start, places = system.phase, [[] for _ in range(system.period)]
    for number, seconds in enumerate(step for turn in turns for step in turn):  # turns are whole periods
        places[(start + number) % system.period].append(seconds)
    return [statistics.median(place) for place in places]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=sorted(CASES), default="cpu", help="which cases, on which device")
    parser.add_argument("--shape", choices=sorted(SHAPES), default=None, help="default: demo, 1b with profile gpu")
    parser.add_argument("--presets", nargs="+", choices=SYSTEMS, default=["graft", "graft-apart", "split"])
    parser.add_argument("--dense", nargs="*", choices=baselines.KINDS, default=list(baselines.KINDS))
    parser.add_argument("--vllm", action="store_true", help="also the dense model under vLLM, which must be installed")
    parser.add_argument("--window", type=int, default=64, help="window of PHOTON and of the dense window system")
    parser.add_argument("--backend", default=None, help="default: torch, triton with profile gpu")
    parser.add_argument("--cuda-graphs", choices=["auto", "off"], default="auto")
    parser.add_argument("--order", choices=["turns", "alone"], default=None, help="default: turns, alone with gpu")
    parser.add_argument("--only", type=int, default=None, help="the one context to measure; default: all")
    parser.add_argument(
        "--longest-encoding",
        type=int,
        default=None,
        help="fill the dense model's cache at random for prompts of this many tokens (then without ttft_s)",
    )
    parser.add_argument("--no-decode", action="store_true", help="measure prefill alone")
    parser.add_argument("--no-prefill", action="store_true", help="measure decoding alone")
    parser.add_argument("--prefill-layers", type=int, default=None, help="layers of the shape to prefill; default: all")
    parser.add_argument(
        "--budget-seconds", type=float, default=None, help="start no decoding after this; default: 280 with profile gpu"
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="default: benchmarks/inference/<profile>-<shape>.json"
    )
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    options = arguments()
    gpu = options.profile == "gpu"
    if gpu and not torch.cuda.is_available():
        raise PhotonError("--profile gpu needs a GPU: use --profile cpu here")
    if options.no_decode and (options.no_prefill or gpu):
        raise PhotonError("--no-decode leaves nothing to measure: drop it, or take --profile cpu without --no-prefill")
    if options.vllm and (not gpu or options.order == "turns"):
        raise PhotonError("--vllm reserves the memory of a GPU: use it with --profile gpu and --order alone")
    options.shape = options.shape or ("1b" if gpu else "demo")
    options.backend = options.backend or ("triton" if gpu else "torch")
    options.order = options.order or ("alone" if gpu else "turns")
    options.budget_seconds = options.budget_seconds or (280.0 if gpu else math.inf)
    if not gpu:
        torch.set_num_threads(1)
    bench = Bench(options, torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32)
    if bench.cases:
        (bench.run_alone if options.order == "alone" else bench.run_in_turns)()
    if bench.prefill:
        bench.prefill.run(on_rows=bench.write)
    bench.write()
    rows = bench.rows()
    for row in rows:
        ratio = "-" if row["decode_ratio"] is None else f"{row['decode_ratio']:.2f}"
        print(f"{row['mode']:14} {row['context']:7} x {row['batch']:4} ({row['batches']:5}) {row['system']:16} {ratio}")
    for row in bench.prefill.rows if bench.prefill else ():
        print(f"{'prefill':14} {row['context']:7} x    1         {row['system']:16} {row['prefill_ratio']:.2f}")
    if rows:
        plot_inference(rows, bench.output.with_suffix(".png"))
    print(f"{bench.output} ({time.perf_counter() - bench.began:.0f} s)")


if __name__ == "__main__":
    main_wrapper(main)
