"""What the server counts, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The server's counters; each server has its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "errata_requests", "HTTP requests answered.", ["route", "status"], registry=self._registry
        )
        self.tokens = Counter("errata_generated_tokens", "Tokens generated.", registry=self._registry)
        self.prompt_tokens = Counter(
            "errata_prompt_tokens", "Tokens of prompts read.", registry=self._registry
        )
        self.rows = Gauge(
            "errata_rows", "Texts that are asked for and not answered yet.", registry=self._registry
        )
        self.edits = Gauge(
            "errata_edits_in_place", "Edits that the ledger has in place.", registry=self._registry
        )
        self.revisions = Counter(
            "errata_revisions", "Changes of what is in place while serving.", registry=self._registry
        )
        self._batch = Histogram(
            "errata_batch_rows", "Rows under way at a step.", buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "errata_step_seconds", "Seconds of a step of the engine.",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10), registry=self._registry,
        )  # fmt: skip

    def step(self, seconds: float, rows: int) -> None:
        """Record a step of the engine."""
        self._seconds.observe(seconds)
        self._batch.observe(rows)

    def text(self) -> bytes:
        """Return all counters as a page that Prometheus reads."""
        return generate_latest(self._registry)
