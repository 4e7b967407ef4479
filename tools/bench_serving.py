"""Serve SmolLM2 three ways over HTTP and write the ratios: the export on vLLM, the dense model on vLLM, our own server.

python tools/bench_serving.py --export RUN/export --dense runs/smollm2 --vllm .venv-vllm/bin

One server runs at a time, on the whole machine; first each has to write, greedily, what transformers writes for its
model. Requests come from vLLM's load generator (`vllm bench serve`). For every length a prompt is read once by itself
(`ttft_s`, one stream, nothing cached); then 1, 8, 32 streams go on from the same prompt, each with some tokens of its
own, so that what is timed is decoding: `decode_tokens_per_s` is the streams over the median time between tokens. A
request's `kv_bytes` are what it has of vLLM's cache while it writes alone (`kv_bytes_reading`: the most while its
prompt is read, tokens in flight included), or of our server what `accounting` states; `sequences_per_gib` follows.
Every ratio is of one run on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import photon_train.models  # noqa: F401  registers PHOTON
from lib.vllm_load import FOUND
from photon_train import accounting
from photon_train.checkpoints import read_config
from photon_train.cli import main_wrapper
from photon_train.errors import PhotonError
from photon_train.evaluation.report import write_rows

LENGTHS, STREAMS = (512, 4096, 16384), (1, 8, 32)
NEW_TOKENS = 32  # of each request
ROOM = 512  # tokens beyond the longest prompt
CHECKED = "The lighthouse stood at the end of a long road. " * 40 + "Every evening the keeper"
SYSTEMS = ("graft-vllm", "dense-vllm", "graft-engine")
START_SECONDS = 300


class Server:
    """A server of one of `SYSTEMS`.

    Args:
        name: Of `SYSTEMS`.
        options: Of the command line.
        port: Where it listens.
    """

    def __init__(self, name: str, options: argparse.Namespace, port: int) -> None:
        self.name, self.options, self.url = name, options, f"http://127.0.0.1:{port}"
        self.directory = options.dense if name == "dense-vllm" else options.export
        longest = str(max(options.lengths) + ROOM)
        if name == "graft-engine":
            memory = f"{options.cache_gib}GiB"
            self.command = [sys.executable, "-m", "photon_train.commands", "serve", "--model", str(self.directory)]
            self.command += ["--name", "model", "--memory", memory, "--max-length", longest, "--dtype", options.dtype]
        else:
            self.command = [str(options.vllm / "vllm"), "serve", str(self.directory), "--served-model-name", "model"]
            self.command += ["--max-model-len", longest, "--dtype", options.dtype, "--max-num-seqs", "64"]
            self.command += ["--max-num-batched-tokens", "2048", "--no-enable-log-requests"]
            # Lengths beyond the model's own: speed does not ask what is written there.
            self.command += ["--hf-overrides", json.dumps({"max_position_embeddings": int(longest)})]
        self.command += ["--port", str(port)]
        self.environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": str(options.cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(os.cpu_count()),
        }

    @contextmanager
    def running(self, log: Path) -> Iterator[None]:
        """It, once it answers."""
        with log.open("w") as out:
            process = subprocess.Popen(self.command, env=self.environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            self._wait(process, log)
            yield
        finally:
            process.terminate()
            process.wait(60)

    def _wait(self, process: subprocess.Popen, log: Path) -> None:
        for _ in range(START_SECONDS):
            if process.poll() is not None:
                raise PhotonError(f"{self.name} does not start: {log.read_text()[-2000:]}")
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.ConnectError:
                time.sleep(1)
        raise PhotonError(f"{self.name} does not answer within {START_SECONDS} s")

    def write(self, prompt: str, count: int) -> str:
        """What it writes greedily after a prompt."""
        body = {"model": "model", "prompt": prompt, "max_tokens": count, "temperature": 0}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=600)
        answer.raise_for_status()
        return answer.json()["choices"][0]["text"]

    def metric(self, name: str) -> float:
        """A figure of its /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = re.search(rf"^{name}(?:\{{.*\}})? ([0-9.e+-]+)$", text, re.MULTILINE)
        if found is None:
            raise PhotonError(f"{self.name} has no {name} in /metrics")
        return float(found[1])

    def cache_usage(self) -> float:
        """Share of vLLM's cache that running requests have; 0 for our server."""
        return 0.0 if self.name == "graft-engine" else self.metric("vllm:kv_cache_usage_perc")

    def reads(self, length: int) -> bool:
        """Whether it takes prompts of `length` tokens: our server none beyond the model's own length."""
        return self.name != "graft-engine" or length + ROOM <= read_config(self.directory).max_position_embeddings

    def request_bytes(self, usage: float, length: int) -> float:
        """Bytes of a running request's cache: of vLLM's by its `usage`, of our server's as `accounting` states."""
        if self.name != "graft-engine":
            return usage * self.options.cache_gib * 2**30
        element = getattr(torch, self.options.dtype).itemsize
        return accounting.cache_bytes(read_config(self.directory), length, element).total


def prompts(tokenizer: Any, length: int, count: int) -> list[str]:
    """Texts with a common beginning of `length` tokens, about, and an ending each."""
    lines = (f"Line {number}: the keeper wrote {number * 7919 % 10007} into the book. " for number in range(length))
    text = f"A case of {length} tokens. " + "".join(lines)
    common = tokenizer.decode(tokenizer(text)["input_ids"][:length])
    return [f"{common}\nReader {number + 1} closed the book, looked up and said:" for number in range(count)]


class LoadGenerator:
    """vLLM's load generator (`vllm bench serve`), started once.

    Args:
        options: Of the command line.
        log: What it prints.
    """

    def __init__(self, options: argparse.Namespace, log: Path) -> None:
        self.options, self.log = options, log
        self.process = subprocess.Popen(
            [str(options.vllm / "python"), str(Path(__file__).parent / "lib" / "vllm_load.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def load(self, server: Server, texts: list[str]) -> dict[str, Any]:
        """Its figures of all texts at once."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "prompts.jsonl")
            path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
            given = ["--backend", "openai", "--base-url", server.url, "--model", "model", "--ignore-eos"]
            given += ["--tokenizer", str(self.options.dense), "--disable-tqdm", "--dataset-name", "custom"]
            given += ["--dataset-path", str(path), "--skip-chat-template", "--custom-output-len", str(NEW_TOKENS)]
            given += ["--num-prompts", str(len(texts)), "--num-warmups", "0"]
            print(json.dumps(given), file=self.process.stdin, flush=True)
            # Other packages print too.
            line = next((line for line in self.process.stdout if line.startswith(FOUND)), None)
        if line is None:
            raise PhotonError(f"the load generator failed at {server.name}: {self.log.read_text()[-2000:]}")
        figures = json.loads(line.removeprefix(FOUND))
        if figures["completed"] != len(texts):
            raise PhotonError(f"{server.name}: {figures['completed']} of {len(texts)} requests were answered")
        return figures

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait(60)


def watch_usage(server: Server, stop: threading.Event, seen: list[float]) -> None:
    """Collect the shares of the cache that are in use, while some is, until `stop`."""
    while not stop.wait(0.1):
        if share := server.cache_usage():
            seen.append(share)


def measure(server: Server, generator: LoadGenerator, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of a running server."""
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    for length in filter(server.reads, options.lengths):
        texts, stop, seen = prompts(tokenizer, length, max(options.streams)), threading.Event(), [0.0]
        watcher = threading.Thread(target=watch_usage, args=(server, stop, seen), daemon=True)
        watcher.start()
        cold = generator.load(server, texts[:1])
        stop.set()
        watcher.join()
        # Read to its end, it writes: the last that was seen of it.
        kept, reading = (server.request_bytes(share, length) for share in (seen[-1], max(seen)))
        # vLLM keeps the windows at a common beginning's end from the second request on.
        generator.load(server, texts[1:2] or texts)
        for streams in options.streams:
            found = generator.load(server, texts[:streams])
            yield {
                "system": server.name,
                "length": length,
                "streams": streams,
                "ttft_s": cold["median_ttft_ms"] / 1e3,
                "shared_ttft_s": found["median_ttft_ms"] / 1e3,
                "decode_tokens_per_s": streams * 1e3 / found["median_itl_ms"],
                "kv_bytes": kept,
                "kv_bytes_reading": reading,
                "sequences_per_gib": 2**30 / kept,
            }


def check(server: Server, options: argparse.Namespace, expected: str) -> None:
    """Refuse to time a server that writes something else than transformers."""
    found = server.write(CHECKED, 24)
    if found != expected:
        raise PhotonError(f"{server.name} writes {found!r}, transformers {expected!r}: nothing was timed")


def expected_text(directory: Path, dtype: str) -> str:
    """What transformers writes greedily after `CHECKED`."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    ids = tokenizer(CHECKED, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every row over the dense model's on vLLM at that length and number of streams."""
    dense = {(row["length"], row["streams"]): row for row in rows if row["system"] == "dense-vllm"}
    return [
        {
            "system": row["system"],
            "length": row["length"],
            "streams": row["streams"],
            "decode": row["decode_tokens_per_s"] / base["decode_tokens_per_s"],
            "ttft": row["ttft_s"] / base["ttft_s"],
            "sequences": row["sequences_per_gib"] / base["sequences_per_gib"],
        }
        for row in rows
        if row["system"] != "dense-vllm" and (base := dense.get((row["length"], row["streams"])))
    ]


def write(rows: list[dict[str, Any]], options: argparse.Namespace, argv: list[str], **more: Any) -> None:
    """Write the rows so far, their ratios, and how they were made."""
    command = " ".join(["python", "tools/bench_serving.py", *map(str, argv)])
    more |= {"command": command, "dtype": options.dtype, "new_tokens": NEW_TOKENS, "ratios": ratios(rows)}
    write_rows(options.output, rows, **more)


def numbers(text: str) -> list[int]:
    """``1,8,32``."""
    return [int(part) for part in text.split(",")]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, help="an exported checkpoint")
    parser.add_argument("--dense", type=Path, required=True, help="the dense model that it came from")
    parser.add_argument("--vllm", type=Path, default=Path(".venv-vllm/bin"), help="the bin folder that has vllm")
    parser.add_argument("--lengths", type=numbers, default=LENGTHS, help="tokens of prompts (512,4096,16384)")
    parser.add_argument("--streams", type=numbers, default=STREAMS, help="requests at a time (1,8,32)")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which of them, comma-separated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--cache-gib", type=int, default=4, help="cache of each server")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/serving/cpu.json"))
    options = parser.parse_args(argv)
    if not (options.vllm / "vllm").is_file():
        raise PhotonError(f"{options.vllm} has no vllm: run `make test-vllm` once, or give --vllm")
    if unknown := set(options.systems.split(",")) - set(SYSTEMS):
        raise PhotonError(f"--systems: no {', '.join(sorted(unknown))}; there are {', '.join(SYSTEMS)}")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    rows, names = [], options.systems.split(",")
    print(f"{len(names)} servers, {len(options.lengths)} lengths: about five minutes each on two cores", flush=True)
    expected: dict[Path, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        generator = LoadGenerator(options, Path(folder, "load.log"))
        for name in names:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            server = Server(name, options, port)
            if server.directory not in expected:
                expected[server.directory] = expected_text(server.directory, options.dtype)
            with server.running(Path(folder, f"{name}.log")):
                check(server, options, expected[server.directory])
                for row in measure(server, generator, options):
                    print(json.dumps(row), flush=True)
                    rows.append(row)
            write(rows, options, sys.argv[1:] if argv is None else argv)  # what follows may fail
        generator.close()
    print(options.output)


if __name__ == "__main__":
    main_wrapper(main)
