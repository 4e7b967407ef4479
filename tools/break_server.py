"""Two hundred clients at once, fast, slow and vanishing ones, on a server for some minutes.

    python tools/break_server.py --output benchmarks/reliability/server.json

A tiny model of random weights is served in a process of its own. Whoever stays must get what it would get alone, at
temperature 0; nobody may get a status of 500; afterwards nothing of the vanished may be left in the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from lib.tiny_inputs import make_inputs
from photon_train.cli import main_wrapper
from photon_train.config import ExportSettings
from photon_train.errors import PhotonError
from photon_train.evaluation.report import write_rows

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [f"Line {number} of a text says " * (1 + number % 5) for number in range(20)]
NEW_TOKENS = 24
BAD = (b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "a", "n": 0}', b'{"prompt": "' + b"a" * 200_000 + b'"}')
PATIENCE = 120.0  # seconds for an answer


def make_export(directory: Path) -> Path:
    """An export of a graft with memory."""
    import torch
    from transformers import AutoTokenizer

    from photon_train.export.save import export_model
    from photon_train.models import PhotonConfig, PhotonForCausalLM

    dense, _ = make_inputs(directory)
    sizes = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {name: sizes[name] for name in (*kept, "num_key_value_heads", "eos_token_id")}
    torch.manual_seed(0)
    model = PhotonForCausalLM(PhotonConfig(window=16, memory_cells={1: [0], 3: [1]}, **config))
    return export_model(
        model, AutoTokenizer.from_pretrained(dense), directory / "export", settings=ExportSettings(), card=""
    )


class Clients:
    """Clients of one server.

    Attributes:
        counts: How requests of each kind ended; faults: what must not happen, in words.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.end = url, time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.expected: dict[str, str] = {}

    def body(self, prompt: str, **more: Any) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, **more}

    async def learn(self) -> None:
        """What each prompt is answered with when nobody else is there."""
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:
            for prompt in PROMPTS:
                answer = await client.post("/v1/completions", json=self.body(prompt))
                self.expected[prompt] = answer.json()["choices"][0]["text"]

    async def client(self, number: int) -> None:
        """One of them, until the time is over; every request on a connection of its own."""
        draw = random.Random(number)
        kinds = (self.fast, self.streaming, self.slow, self.vanishing, self.silent, self.wrong)
        while time.monotonic() < self.end:
            kind = draw.choice(kinds)
            try:
                await kind(draw, draw.choice(PROMPTS))
                self.counts[kind.__name__] += 1
            except (httpx.HTTPError, OSError) as error:
                self.faults[f"{kind.__name__}: {type(error).__name__}"] += 1

    def judge(self, status: int, kind: str) -> bool:
        """Whether the request was answered; to be sent away for now (429) is no fault."""
        if status == 429:
            self.counts["sent away"] += 1
        elif status != 200:
            self.faults[f"{kind}: status {status}"] += 1
        return status == 200

    def compare(self, text: str, prompt: str, kind: str) -> None:
        if text != self.expected[prompt]:
            self.faults[f"{kind}: another text"] += 1

    async def fast(self, draw: random.Random, prompt: str) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:
            answer = await client.post("/v1/completions", json=self.body(prompt))
        if self.judge(answer.status_code, "fast"):
            self.compare(answer.json()["choices"][0]["text"], prompt, "fast")
        else:
            await asyncio.sleep(1)

    async def streaming(self, draw: random.Random, prompt: str, pause: float = 0.0) -> None:
        body, text, kind = self.body(prompt, stream=True), "", "slow" if pause else "streaming"
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if not self.judge(answer.status_code, kind):
                    return
                async for line in answer.aiter_lines():
                    await asyncio.sleep(pause)
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
        self.compare(text, prompt, kind)

    async def slow(self, draw: random.Random, prompt: str) -> None:
        """Reads its stream slowly."""
        await self.streaming(draw, prompt, pause=draw.uniform(0.05, 0.3))

    async def vanishing(self, draw: random.Random, prompt: str) -> None:
        """Hangs up while it is answered, or while it asks."""
        content = json.dumps(self.body(prompt, stream=draw.random() < 0.5, n=draw.choice((1, 3)))).encode()
        head = ["POST /v1/completions HTTP/1.1", "Host: a", "Content-Type: application/json"]
        sent = "\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content
        await self._raw(sent[: draw.choice((10, len(sent) // 2, len(sent), len(sent)))], draw.uniform(0, 1.5))

    async def silent(self, draw: random.Random, prompt: str) -> None:
        """Connects and says nothing."""
        await self._raw(b"", draw.uniform(0, 3))

    async def _raw(self, sent: bytes, pause: float) -> None:
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        await writer.drain()
        await asyncio.sleep(pause)
        writer.transport.abort()

    async def wrong(self, draw: random.Random, prompt: str) -> None:
        """Asks for what there is not."""
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:
            headers = {"content-type": "application/json"}
            answer = await client.post("/v1/completions", content=draw.choice(BAD), headers=headers)
        if answer.status_code != 400 or "error" not in answer.json():
            self.faults[f"wrong: status {answer.status_code}"] += 1

    async def after(self) -> dict[str, float]:
        """What the server holds once everybody has gone."""
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:
            for _ in range(60):
                health = (await client.get("/health")).json()
                if not health["open_requests"]:
                    break
                await asyncio.sleep(0.5)
            metrics = (await client.get("/metrics")).text
            left = {name: float(value) for name, value in re.findall(r"^photon_(\w+) (\S+)$", metrics, re.M)}
            if health["status"] != "ok" or health["open_requests"]:
                self.faults[f"afterwards: {health}"] += 1
            if left["sequences_running"] or left["sequences_waiting"] or left["cache_rows_used"] != left["prefixes"]:
                self.faults["afterwards: the cache is not free"] += 1
        before, self.expected = self.expected, {}
        await self.learn()
        if before != self.expected:
            self.faults["afterwards: other answers"] += 1
        return left


async def rush(url: str, seconds: float, number: int) -> Clients:
    clients = Clients(url, seconds)
    await clients.learn()
    clients.end = time.monotonic() + seconds
    await asyncio.gather(*(clients.client(index) for index in range(number)))
    await clients.after()
    return clients


def memory_of(process: subprocess.Popen) -> int:
    """Resident bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--seconds", type=float, default=300, help="how long")
    parser.add_argument("--clients", type=int, default=200, help="at a time")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        export = make_export(Path(scratch))
        command = [sys.executable, "-m", "photon_train.commands.serve", "--model", str(export), "--port", str(port)]
        command += ["--device", "cpu", "--max-length", "1024", "--max-sequences", "32", "--max-waiting", "128"]
        with Path(scratch, "log").open("w+", encoding="utf-8") as log:
            server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            try:
                url = f"http://127.0.0.1:{port}"
                for _ in range(240):
                    try:
                        httpx.get(f"{url}/health")
                        break
                    except httpx.HTTPError:
                        time.sleep(0.5)
                else:
                    raise PhotonError("the server does not start")
                began = memory_of(server)
                clients = asyncio.run(rush(url, options.seconds, options.clients))
                ended = memory_of(server)
            finally:
                server.terminate()
                try:
                    server.wait(60)
                except subprocess.TimeoutExpired:
                    server.kill()
                    clients.faults["the server does not end when it is told to"] += 1
            log.seek(0)
            if "Traceback" in log.read():
                clients.faults["a traceback in the server's log"] += 1
    row = {
        "clients": options.clients,
        "seconds": options.seconds,
        "requests": sum(clients.counts.values()),
        "by_kind": dict(sorted(clients.counts.items())),
        "faults": sum(clients.faults.values()),
        "found": dict(clients.faults),
        "resident_bytes": {"before": began, "after": ended},
    }
    print(json.dumps(row))
    write_rows(options.output, [row], command=" ".join(["python", *sys.argv]))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main_wrapper(main)
