"""Decode and prefill of whole models: tmac_py beside llama.cpp and ik_llama.cpp.

    python bench/models.py --peer llama.cpp=PYTHON --peer ik_llama.cpp=PYTHON
    python bench/models.py --model llama-2-7b/8:2bit --peer llama.cpp=PYTHON

The default model comes from one GGUF file in all engines; a shape gets random weights, in each type
of the peers that has as many bits, and a 6-bit head. Each engine runs in a process of its own,
loads the model once and times one sample on command. Samples come in pairs, a peer's and ours
right after each other and in turns first, so that a neighbour's load meets both; a ratio is the
median of the ratios of pairs. The roofs are measured between the rounds. Only the model's steps
are timed: no sampling, no text. bench/README.md says how to install the peers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from measure import (
    OtherLoad,
    default_thread_counts,
    machine_facts,
    memory_buffer_bytes,
    positive,
    positive_list,
)
from model_contenders import MODEL, Contender, default_model, peer, shape_model
from model_report import as_json, report
from tqdm import tqdm
from worker_process import WorkerDied, WorkerProcess

from tmac_py import TmacError, _core

Test = Literal["decode", "prefill"]
TESTS: tuple[Test, ...] = ("decode", "prefill")
PROMPT = (504, 3575, 282, 4649, 314)
IDLE_SECONDS = 0.05  # between samples: the threads of the engine before have gone to sleep


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    rounds: int
    tests: dict[Test, int]  # tokens of each


@dataclass
class Entry:
    """All samples of one contender in one test with one number of threads, tokens/s.

    ``ours`` has those of tmac_py right beside them.
    """

    contender: Contender
    test: Test
    threads: int
    samples: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)


@dataclass
class Roofs:
    """What the machine gave between the rounds of one number of threads."""

    memory_gb_s: list[float] = field(default_factory=list)
    model_gb_s: list[float] = field(default_factory=list)  # from a buffer as large as the model
    multiply_gop_s: list[float] = field(default_factory=list)  # int8 multiply-adds


@dataclass
class Results:
    """All that was measured."""

    contenders: list[Contender]  # the first is tmac_py
    products: int  # multiply-adds of one token of a prompt
    entries: list[Entry] = field(default_factory=list)
    roofs: dict[int, Roofs] = field(default_factory=dict)
    equal_choices: dict[str, int] = field(default_factory=dict)  # by contender, of decode steps
    notes: list[str] = field(default_factory=list)


class Engine:
    """A contender's process; it sleeps before each command."""

    def __init__(self, contender: Contender, *, threads: int, n_ctx: int) -> None:
        self._process = WorkerProcess(
            "engine_worker.py",
            python=contender.python,
            engine=contender.engine,
            path=str(contender.path),
            threads=threads,
            n_ctx=n_ctx,
            **contender.options,
        )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one of engine_worker.COMMANDS."""
        time.sleep(IDLE_SECONDS)
        return self._process.ask(command, **arguments)

    def close(self) -> None:
        self._process.close()


def run(results: Results, threads: int, settings: Settings, vocab_size: int) -> None:
    """Measure with ``threads`` threads, one peer after the other."""
    ours, *others = results.contenders
    roofs = results.roofs[threads] = Roofs()
    pool = _core.ThreadPool(threads)
    commands = _commands(settings, vocab_size)
    n_ctx = -(-(sum(settings.tests.values()) + len(PROMPT)) // 256) * 256
    own = Engine(ours, threads=threads, n_ctx=n_ctx)
    for command in commands.values():
        own.ask(**command)
    for contender in tqdm(others or [ours], desc=f"threads {threads}", unit="engine"):
        try:
            engine = own if contender is ours else Engine(contender, threads=threads, n_ctx=n_ctx)
            for command in commands.values():
                answer = engine.ask(**command)
                if contender.same_file and command["command"] == "decode":
                    results.equal_choices[contender.name] = _agreement(own, command, answer)
            entries = {test: Entry(contender, test, threads) for test in commands}
            for number in range(settings.rounds):
                for test, command in commands.items():
                    _pair(entries[test], own, engine, command, ours_first=number % 2 == 0)
                roofs.memory_gb_s.append(_core.read_bandwidth(memory_buffer_bytes(), pool))
                roofs.model_gb_s.append(_core.read_bandwidth(ours.bytes_per_token, pool))
                roofs.multiply_gop_s.append(_core.multiply_peak(pool) / 1e9)
            results.entries += entries.values()
            if engine is not own:
                engine.close()
        except WorkerDied as error:
            results.notes.append(f"{contender.name}: {error}")
    own.close()


def _commands(settings: Settings, vocab_size: int) -> dict[Test, dict[str, Any]]:
    ids = np.random.default_rng(0).integers(vocab_size, size=settings.tests.get("prefill", 1))
    commands: dict[Test, dict[str, Any]] = {}
    for test, tokens in settings.tests.items():
        if test == "decode":
            commands[test] = {"command": test, "prompt": list(PROMPT), "n_tokens": tokens}
        else:
            commands[test] = {"command": test, "prompt": ids.tolist()}
    return commands


def _agreement(own: Engine, command: dict[str, Any], answer: dict[str, Any]) -> int:
    """At how many steps of a peer's text tmac_py would have chosen the same token."""
    text = answer["tokens"]
    choices = own.ask("follow", prompt=command["prompt"], text=text)["tokens"]
    return sum(a == b for a, b in zip(text, choices, strict=True))


def _pair(
    entry: Entry, own: Engine, engine: Engine, command: dict[str, Any], *, ours_first: bool
) -> None:
    if engine is own:
        entry.samples.append(own.ask(**command)["tok_s"])
        entry.ours.append(entry.samples[-1])
        return
    for turn in (own, engine) if ours_first else (engine, own):
        samples = entry.ours if turn is own else entry.samples
        samples.append(turn.ask(**command)["tok_s"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    args = _parser().parse_args(arguments)
    lengths = {"decode": args.decode_tokens, "prefill": args.prefill_tokens}
    settings = Settings(args.rounds, {test: lengths[test] for test in args.tests})
    facts = machine_facts()
    load = OtherLoad()
    with tempfile.TemporaryDirectory(prefix="tmac-bench-", dir=args.folder) as folder:
        try:
            if args.model == MODEL:
                model = default_model(args.peer, args.cache_dir, args.tables)
            else:
                model = shape_model(args.model, args.peer, Path(folder), args.tables, args.types)
            results = Results(model.contenders, model.products, notes=model.notes)
            for threads in args.threads:
                run(results, threads, settings, model.vocab_size)
        except (TmacError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except WorkerDied as error:
            print(f"error: an engine failed: {error}", file=sys.stderr)
            return 1
    facts["model"], facts["peers"] = args.model, model.peers
    facts["other_load_cpus"] = load.cpus()
    print(report(facts, asdict(settings), results))
    if args.json:
        text = json.dumps(as_json(facts, asdict(settings), results), indent=2)
        args.json.write_text(text + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default=MODEL, help=f"{MODEL} (default), or a shape as tmac-bench --synthetic")
    add(
        "--peer",
        type=peer,
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="an environment with llama-cpp-python or ik-llama-cpp-python; may be repeated",
    )
    add("--types", type=lambda text: text.split(","), help="of the peers, as Q2_K,TQ2_0")
    add("-t", "--threads", type=positive_list, default=default_thread_counts(), metavar="1,2")
    add("--tests", type=_tests, default=TESTS, metavar="decode,prefill", help="(default both)")
    add("--rounds", type=positive, default=5, help="pairs of samples (default 5)")
    add("--decode-tokens", type=positive, default=64, metavar="N", help="(default 64)")
    add("--prefill-tokens", type=positive, default=512, metavar="N", help="(default 512)")
    add("--tables", choices=("int8", "exact", "exact8"), help="tables of tmac_py")
    add("--json", type=Path, metavar="FILE", help="write the report with all samples here as well")
    add("--cache-dir", type=Path, metavar="DIR", help="where the default model is kept")
    add("--folder", type=Path, metavar="DIR", help="where models of random weights are written")
    return parser


def _tests(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(TESTS):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {', '.join(TESTS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
