"""What types of KV cache cost in quality and memory, and how fast a long context is read.

    python bench/kv_cache.py MODEL.lut [--text FILE] [--tokens N] [--speed N_CTX]

Prints, for each type, the bytes of a position and the KL divergence (nats: mean, 99th percentile,
largest) of the next token's distribution from that with fp16 keys and values, on the first tokens
of a text. With --speed: tokens per second at contexts of up to N_CTX tokens beside the bandwidth
that the same threads read with; types alternate, medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tmac_py import Model, _core
from tmac_py.pool import thread_pool

TYPES = ("f16", "int8", "int8/int4", "int4")
TEXT = Path(__file__).resolve().parent.parent / "tests" / "golden" / "text-short.txt"


def log_probabilities(model: Model, ids: list[int], kv: str) -> NDArray[np.float64]:
    logits = model.forward(ids, model.new_cache(len(ids), kv), "all")
    wide = logits.astype(np.float64) - logits.max(1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    return result


def quality(path: Path, text: Path, n: int) -> None:
    with Model.load(path, tables="exact") as model:
        ids = model.tokenizer.encode(text.read_text(), add_special=False)[:n]
        want = log_probabilities(model, ids, "f16")
        print(f"{len(ids)} tokens\n{'kv':>10} {'bytes/token':>12} {'mean KL':>9} {'99 %':>9} max")
        for kv in TYPES:
            got = log_probabilities(model, ids, kv)
            divergence = (np.exp(want) * (want - got)).sum(1)
            per_token = model.new_cache(model.n_ctx, kv).nbytes / model.n_ctx
            print(
                f"{kv:>10} {per_token:12.0f} {divergence.mean():9.2e} "
                f"{np.quantile(divergence, 0.99):9.2e} {divergence.max():.2e}"
            )


def step_seconds(model: Model, cache: _core.KvCache, steps: int = 4) -> float:
    pos = cache.pos
    model.forward([1], cache)
    start = time.perf_counter()
    for _ in range(steps):
        model.forward([1], cache)
    seconds = (time.perf_counter() - start) / steps
    cache.truncate(pos)
    return seconds


def speed(path: Path, n_ctx: int, rounds: int = 7) -> None:
    with Model.load(path, check=False) as model:
        pool = thread_pool(model.threads)
        contexts = [0, n_ctx // 8, n_ctx]
        caches: dict[tuple[str, int], _core.KvCache] = {}
        for kv in TYPES:
            cache = model.new_cache(n_ctx + 8, kv)
            start = time.perf_counter()
            for first in range(0, n_ctx, n_ctx // 8):
                if first in contexts:
                    caches[kv, first] = cache.fork(first + 8)
                model.forward(np.arange(first, first + n_ctx // 8) % 1000, cache)
            print(
                f"{kv:>10} prefill {n_ctx / (time.perf_counter() - start):8.1f} tok/s", flush=True
            )
            caches[kv, n_ctx] = cache
        seconds: dict[tuple[str, int], list[float]] = {key: [] for key in caches}
        bandwidth = []
        for _ in range(rounds):
            bandwidth.append(_core.read_bandwidth(1 << 29, pool))
            for key, cache in caches.items():
                seconds[key].append(step_seconds(model, cache))
        print(f"read bandwidth {statistics.median(bandwidth):.1f} GB/s, {model.threads} threads")
        for kv in TYPES:
            base = statistics.median(seconds[kv, 0])
            per_token = caches[kv, n_ctx].nbytes / (n_ctx + 8)
            for held in contexts:
                here = statistics.median(seconds[kv, held])
                read = held * per_token / 1e6
                print(
                    f"{kv:>10} context {held:6d}: {1 / here:7.1f} tok/s, {base / here:6.1%} of "
                    f"empty; {read:6.0f} MB of KV, {read / 1e3 / max(here - base, 1e-9):6.1f} GB/s"
                )


def main() -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--speed", type=int, default=0, metavar="N_CTX")
    args = parser.parse_args()
    if args.speed:
        speed(args.model, args.speed)
    else:
        quality(args.model, args.text, args.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
