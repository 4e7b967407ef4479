"""What a server has done, in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from photon_train.inference.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("answered", "failed", "dropped", "refused")
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Durations in seconds, counted by upper bounds."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(_BOUNDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(_BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Its samples."""
        counts, below = list(self.counts), 0
        for bound, count in zip((*_BOUNDS, "+Inf"), counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.total}"
        yield f"{name}_count {below}"


class Metrics:
    """Counters of a server; the engine's thread writes them, whoever likes reads them.

    Attributes:
        requests: By how they ended: answered, failed, dropped by their client, refused.
        prompt_tokens, generated_tokens: Tokens in and out.
        first_token, whole: Seconds from a request's arrival to its first token, and to its last.
    """

    def __init__(self) -> None:
        self.requests = dict.fromkeys(OUTCOMES, 0)
        self.prompt_tokens = self.generated_tokens = 0
        self.first_token, self.whole = Histogram(), Histogram()

    def render(self, engine: Engine, num_open: int) -> str:
        """All of them, and the state of the engine.

        Args:
            num_open: Requests that are not finished.
        """
        scheduler, pool = engine.scheduler, engine.cache.pool
        parts = [_head("photon_requests_total", "counter", "requests by how they ended")]
        parts += [f'photon_requests_total{{outcome="{name}"}} {count}' for name, count in self.requests.items()]
        for name, kind, text, value in (
            ("prompt_tokens_total", "counter", "tokens of prompts", self.prompt_tokens),
            ("generated_tokens_total", "counter", "tokens of answers", self.generated_tokens),
            ("prefix_hit_tokens_total", "counter", "tokens of prompts found encoded", engine.prefixes.hit_tokens),
            ("preemptions_total", "counter", "sequences swapped to main memory", scheduler.num_preemptions),
            ("requests_open", "gauge", "requests that are not finished", num_open),
            ("sequences_running", "gauge", "sequences that run", len(scheduler.running)),
            ("sequences_waiting", "gauge", "sequences that wait for their turn", len(scheduler.waiting)),
            ("cache_blocks", "gauge", "blocks of the cache", pool.num_blocks),
            ("cache_blocks_used", "gauge", "blocks that hold something", pool.num_blocks - pool.num_free),
            ("cache_rows", "gauge", "rows of the cache", engine.cache.layout.num_rows),
            ("cache_rows_used", "gauge", "rows in use", engine.cache.layout.num_rows - engine.cache.num_free_rows),
            ("prefixes", "gauge", "prefixes that are kept", len(engine.prefixes)),
        ):
            parts += [_head(f"photon_{name}", kind, text), f"photon_{name} {value}"]
        for name, text, histogram in (
            ("photon_first_token_seconds", "from a request's arrival to its first token", self.first_token),
            ("photon_request_seconds", "from a request's arrival to its last token", self.whole),
        ):
            parts += [_head(name, "histogram", text), *histogram.lines(name)]
        return "\n".join(parts) + "\n"


def _head(name: str, kind: str, text: str) -> str:
    return f"# HELP {name} {text}\n# TYPE {name} {kind}"
