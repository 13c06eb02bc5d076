"""What the engine does, as Prometheus reads it; names as llama-server's, with our prefix."""

from __future__ import annotations

from tmac_py.server.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_text(engine: Engine) -> str:
    """All metrics in the text format 0.0.4."""
    counters = engine.counters
    rows: list[tuple[str, str, float, str]] = [
        (
            "prompt_tokens_total",
            "counter",
            counters.prompt_tokens,
            "Prompt tokens that were computed.",
        ),
        (
            "prompt_seconds_total",
            "counter",
            counters.prompt_seconds,
            "Seconds of computing prompts.",
        ),
        (
            "tokens_predicted_total",
            "counter",
            counters.decode_tokens,
            "Tokens decoded after the first of each answer.",
        ),
        (
            "tokens_predicted_seconds_total",
            "counter",
            counters.decode_seconds,
            "Seconds of decoding.",
        ),
        ("n_decode_total", "counter", counters.n_decode, "Passes over the weights for decoding."),
        (
            "prompt_tokens_seconds",
            "gauge",
            _ratio(counters.prompt_tokens, counters.prompt_seconds),
            "Prompt tokens per second of computing them.",
        ),
        (
            "predicted_tokens_seconds",
            "gauge",
            _ratio(counters.decode_tokens, counters.decode_seconds),
            "Decoded tokens per second of decoding, of all answers together.",
        ),
        (
            "n_busy_slots_per_decode",
            "gauge",
            _ratio(counters.n_busy, counters.n_decode),
            "Answers that shared a pass over the weights, on average.",
        ),
        ("requests_processing", "gauge", engine.n_active, "Requests that have a slot."),
        ("requests_deferred", "gauge", engine.n_waiting, "Requests that wait for one."),
        ("requests_finished_total", "counter", counters.finished, "Complete answers."),
        ("requests_cancelled_total", "counter", counters.cancelled, "Requests given up."),
        ("requests_failed_total", "counter", counters.failed, "Requests that failed."),
    ]
    lines = []
    for name, kind, value, text in rows:
        lines += [
            f"# HELP tmac:{name} {text}",
            f"# TYPE tmac:{name} {kind}",
            f"tmac:{name} {value!r}",
        ]
    return "\n".join(lines) + "\n"


def _ratio(amount: float, per: float) -> float:
    return amount / per if per else 0.0
