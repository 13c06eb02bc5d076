"""One engine in a process of its own: loads a model once, then times samples on command.

Started by compare_llama_cpp.py. Commands and answers are lines of JSON on standard input and
output; between commands the process sleeps.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray


class Engine(Protocol):
    """A loaded model with one context."""

    facts: dict[str, Any]

    def clear(self) -> None:
        """Forget the context."""

    def step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append ``ids`` to the context; logits [vocab] after the last."""


class TmacEngine:
    """tmac_py, on the interface below sampling."""

    def __init__(
        self, path: str, *, threads: int, n_ctx: int, tables: Literal["int8", "exact"]
    ) -> None:
        from tmac_py import Model, _core

        self._model = Model.load(path, threads=threads, tables=tables)
        self._cache = self._model.new_cache(n_ctx)
        self.facts = {"version": _core.__version__, "isa": _core.active_isa(), "tables": tables}

    def clear(self) -> None:
        self._cache.truncate(0)

    def step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self._model.forward(np.asarray(ids, dtype=np.int32), self._cache)


class LlamaEngine:
    """llama.cpp as llama-cpp-python builds it; with flash attention, which is faster."""

    def __init__(self, path: str, *, threads: int, n_ctx: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._llama = llama_cpp.Llama(
            path,
            n_ctx=n_ctx,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )
        features = re.findall(r"(\w+) = 1\b", llama_cpp.llama_print_system_info().decode())
        self.facts = {"version": llama_cpp.__version__, "features": features}

    def clear(self) -> None:
        self._llama.reset()

    def step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._llama.eval(ids)
        logits = self._api.llama_get_logits_ith(self._llama.ctx, -1)  # waits for the result
        return np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),))


def decode(engine: Engine, prompt: Sequence[int], n_tokens: int) -> dict[str, Any]:
    """Time ``n_tokens`` greedy steps after ``prompt``; the choice of a token is not timed."""
    engine.clear()
    token = int(engine.step(prompt).argmax())
    tokens, seconds = [token], 0.0
    for _ in range(n_tokens):
        start = time.perf_counter()
        logits = engine.step([token])
        seconds += time.perf_counter() - start
        token = int(logits.argmax())
        tokens.append(token)
    return {"tok_s": n_tokens / seconds, "tokens": tokens}


def follow(engine: Engine, prompt: Sequence[int], text: Sequence[int]) -> dict[str, Any]:
    """The token that the engine would choose at each step of ``text``, given what is before it."""
    engine.clear()
    choices = [int(engine.step(prompt).argmax())]
    choices += [int(engine.step([token]).argmax()) for token in text[:-1]]
    return {"tokens": choices}


def prefill(engine: Engine, prompt: Sequence[int]) -> dict[str, Any]:
    """Time ``prompt`` in one call from an empty context."""
    engine.clear()
    start = time.perf_counter()
    engine.step(prompt)
    return {"tok_s": len(prompt) / (time.perf_counter() - start)}


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "decode": decode,
    "follow": follow,
    "prefill": prefill,
}


def main() -> None:
    """Serve commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the engines print does not mix with the answers
    options = json.loads(sys.argv[1])
    engine: Engine
    if options.pop("engine") == "tmac_py":
        engine = TmacEngine(**options)
    else:
        engine = LlamaEngine(**options)
    print(json.dumps(engine.facts), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        answer = COMMANDS[command.pop("command")](engine, **command)
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
