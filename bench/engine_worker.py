"""One engine in a process of its own: loads a model once, then times samples on command.

Started by models.py with the interpreter of an environment that has the engine, and NumPy. Commands
and answers are lines of JSON on standard input and output; between commands the process sleeps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Tables = Literal["int8", "exact", "exact8"]


class Engine(Protocol):
    """A loaded model with one context."""

    facts: dict[str, Any]

    def clear(self) -> None:
        """Forget the context."""

    def step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append ``ids`` to the context; logits [vocab] after the last."""


class TmacEngine:
    """tmac_py, on the interface below sampling."""

    def __init__(self, path: str, *, threads: int, n_ctx: int, tables: Tables | None) -> None:
        from tmac_py import Model, _core

        self._model = Model.load(path, threads=threads, tables=tables)
        self._cache = self._model.new_cache(n_ctx)
        self.facts = {"version": _core.__version__, "tables": self._model.tables}

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
        self.facts = {"version": llama_cpp.__version__}

    def clear(self) -> None:
        self._llama.reset()

    def step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._llama.eval(ids)
        logits = self._api.llama_get_logits_ith(self._llama.ctx, -1)  # waits for the result
        return np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),))


class IkEngine:
    """ik_llama.cpp as ik-llama-cpp-python builds it; with flash attention where it trusts it."""

    def __init__(self, path: str, *, threads: int, n_ctx: int, repacked: bool) -> None:
        from importlib.metadata import version

        from ik_llama_cpp import IkLlama, _ctypes_api, _internals

        load = _ctypes_api.llama_model_default_params

        def parameters() -> Any:
            chosen = load()
            chosen.repack_tensors = repacked
            return chosen

        _ctypes_api.llama_model_default_params = parameters
        self._make = _internals.make_batch_range
        self._free = _ctypes_api.llama_batch_free
        self._llama = IkLlama(path, n_ctx=n_ctx, n_threads=threads, use_mmap=not repacked)
        self._pos = 0
        self.facts = {"version": version("ik-llama-cpp-python")}

    def clear(self) -> None:
        self._llama._context.kv_cache_clear()
        self._pos = 0

    def step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        context = self._llama._context
        for start in range(0, len(ids), context._n_ubatch):
            chunk = list(ids[start : start + context._n_ubatch])
            last = start + len(chunk) == len(ids)
            batch = self._make(chunk, pos_start=self._pos, logits_last=last)
            status = context.decode(batch)
            self._free(batch)
            if status != 0:
                raise RuntimeError(f"llama_decode ended with status {status}")
            self._pos += len(chunk)
        return np.ctypeslib.as_array(context.get_logits(-1), shape=(self._llama._model.n_vocab,))


ENGINES: dict[str, Callable[..., Engine]] = {
    "tmac_py": TmacEngine,
    "llama_cpp": LlamaEngine,
    "ik_llama_cpp": IkEngine,
}


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
    engine = ENGINES[options.pop("engine")](**options)
    print(json.dumps(engine.facts), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        answer = COMMANDS[command.pop("command")](engine, **command)
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
