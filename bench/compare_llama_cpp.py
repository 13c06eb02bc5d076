"""Decode and prefill of the default model: tmac_py against llama.cpp on the same GGUF.

    pip install llama-cpp-python==0.3.36
    python bench/compare_llama_cpp.py

Each engine runs in a process of its own, loads the model once and times one sample on command.
Samples come in pairs, one of each engine right after the other and in turns first, so that a
neighbour's load meets both; the ratio is the median of the ratios of pairs. Read bandwidth is
measured between the rounds. Only the model's steps are timed: no sampling, no text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from measure import (
    OtherLoad,
    Spread,
    default_thread_counts,
    describe,
    describe_load,
    machine_facts,
    memory_buffer_bytes,
    positive,
    positive_list,
)
from worker_process import WorkerDied, WorkerProcess

from tmac_py import TmacError, _core
from tmac_py.cli.progress import PhaseProgress
from tmac_py.cli.tables import format_table
from tmac_py.default_model import DEFAULT_MODELS, cached_path, ensure_model, fetch_gguf
from tmac_py.lutfile import LutFile
from tmac_py.tokenizer import Tokenizer

MODEL = "smollm2-135m"
PROMPT = "The capital of France is"
ENGINES = ("tmac_py", "llama.cpp")
REQUIREMENT = "llama-cpp-python==0.3.36"
IDLE_SECONDS = 0.05  # between samples: the threads of the engine before have gone to sleep


class Worker(WorkerProcess):
    """One engine, in a process of engine_worker.py; it sleeps before each command."""

    def __init__(self, engine: str, **options: Any) -> None:
        super().__init__("engine_worker.py", engine=engine, **options)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one of engine_worker.COMMANDS."""
        time.sleep(IDLE_SECONDS)
        return super().ask(command, **arguments)


@dataclass(frozen=True)
class Checkpoint:
    """One model in both forms."""

    paths: dict[str, str]  # by engine
    bytes_per_token: dict[str, int]  # by engine: matrices that one decoded token reads
    prompt: list[int]
    vocab_size: int

    @classmethod
    def fetch(cls, cache_dir: Path | None) -> Checkpoint:
        """Download and convert what is not in the cache folder yet."""
        with PhaseProgress() as progress:
            lut = ensure_model(MODEL, cache_dir=cache_dir, progress=progress)
            gguf = cached_path(MODEL, cache_dir).with_name(Path(DEFAULT_MODELS[MODEL].member).name)
            if not gguf.is_file():
                fetch_gguf(MODEL, gguf, progress=progress)
        with LutFile.open(lut) as file:
            tokenizer = Tokenizer(file.tokenizer, bos_id=file.config.bos_token_id)
            return cls(
                paths=dict(zip(ENGINES, (str(lut), str(gguf)), strict=True)),
                bytes_per_token=dict(
                    zip(ENGINES, (_lut_bytes(file), _gguf_bytes(gguf)), strict=True)
                ),
                prompt=[int(token) for token in tokenizer.encode(PROMPT)],
                vocab_size=file.config.vocab_size,
            )


def _lut_bytes(file: LutFile) -> int:
    """Of an untied embedding a token reads one row, of a tied one all as lm_head."""
    sizes = {name: entry.nbytes for name, entry in file.tensors.items() if entry.kind == "linear"}
    if not file.config.tie_word_embeddings:
        del sizes["model.embed_tokens.weight"]
    return sum(sizes.values())


def _gguf_bytes(path: Path) -> int:
    sizes = {str(t.name): int(t.n_bytes) for t in GGUFReader(path).tensors if len(t.shape) == 2}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    rounds: int
    decode_tokens: int
    prefill_tokens: int
    tables: str


@dataclass(frozen=True)
class Run:
    """All samples with one number of threads."""

    threads: int
    engines: dict[str, dict[str, Any]]  # what each says about itself
    samples: dict[str, dict[str, list[float]]]  # test -> engine -> tokens/s, one for each round
    equal_choices: int  # of tmac_py, along the decode_tokens + 1 tokens that llama.cpp chose
    memory_gb_s: list[float]
    model_gb_s: list[float]  # from a buffer as large as the model

    def tok_s(self, test: str, engine: str) -> Spread:
        return Spread.of(self.samples[test][engine])

    def ratio(self, test: str) -> Spread:
        """Of the pairs: tmac_py / llama.cpp."""
        ours, theirs = (self.samples[test][engine] for engine in ENGINES)
        return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def run(checkpoint: Checkpoint, threads: int, settings: Settings) -> Run:
    """Measure with ``threads`` threads."""
    n_ctx = max(len(checkpoint.prompt) + settings.decode_tokens, settings.prefill_tokens)
    common = {"threads": threads, "n_ctx": -(-n_ctx // 256) * 256}
    ours, theirs = ENGINES
    workers = {
        ours: Worker(ours, path=checkpoint.paths[ours], tables=settings.tables, **common),
        theirs: Worker(theirs, path=checkpoint.paths[theirs], **common),
    }
    ids = np.random.default_rng(0).integers(checkpoint.vocab_size, size=settings.prefill_tokens)
    commands: dict[str, dict[str, Any]] = {
        "decode": {"prompt": checkpoint.prompt, "n_tokens": settings.decode_tokens},
        "prefill": {"prompt": ids.tolist()},
    }
    pool = _core.ThreadPool(threads)
    result = Run(
        threads=threads,
        engines={engine: worker.facts for engine, worker in workers.items()},
        samples={test: {engine: [] for engine in ENGINES} for test in commands},
        equal_choices=_warm_up(workers, commands),
        memory_gb_s=[],
        model_gb_s=[],
    )
    for number in range(settings.rounds):
        order = ENGINES if number % 2 == 0 else ENGINES[::-1]
        for test, command in commands.items():
            for engine in order:
                answer = workers[engine].ask(test, **command)
                result.samples[test][engine].append(answer["tok_s"])
        size = checkpoint.bytes_per_token[ours]
        result.memory_gb_s.append(_core.read_bandwidth(memory_buffer_bytes(), pool))
        result.model_gb_s.append(_core.read_bandwidth(size, pool))
    for worker in workers.values():
        worker.close()
    return result


def _warm_up(workers: dict[str, Worker], commands: dict[str, dict[str, Any]]) -> int:
    """Run everything once; returns at how many steps of one text the engines choose the same."""
    for worker in workers.values():
        worker.ask("prefill", **commands["prefill"])
    ours, theirs = workers.values()
    text = theirs.ask("decode", **commands["decode"])["tokens"]
    choices = ours.ask("follow", prompt=commands["decode"]["prompt"], text=text)["tokens"]
    return sum(a == b for a, b in zip(text, choices, strict=True))


def report(
    checkpoint: Checkpoint, facts: dict[str, Any], settings: Settings, runs: list[Run]
) -> str:
    """The text that is printed."""
    theirs = runs[0].engines["llama.cpp"]
    megabytes = [f"{name} {size / 1e6:.1f}" for name, size in checkpoint.bytes_per_token.items()]
    steps = settings.decode_tokens + 1
    agreed = [f"{run.equal_choices} of {steps} steps (threads {run.threads})" for run in runs]
    heading = [
        *describe(facts),
        ("llama.cpp", f"llama-cpp-python {theirs['version']}: {' '.join(theirs['features'])}"),
        ("model", f"{MODEL}, {Path(checkpoint.paths['llama.cpp']).name}, {settings.tables} tables"),
        ("weights", f"MB a token reads: {', '.join(megabytes)}"),
        ("agreement", f"tmac_py chooses llama.cpp's token at {', '.join(agreed)}"),
        ("others", describe_load(facts["other_load_cpus"])),
        ("samples", f"{settings.rounds} pairs; shown: median (lowest-highest)"),
    ]
    return "\n\n".join(
        (
            format_table(heading, indent=""),
            format_table(_speed_rows(settings, runs), right="rlrrr", indent=""),
            "Weights read while decoding, beside the read bandwidth in the same run, GB/s:",
            format_table(_bandwidth_rows(checkpoint, runs), right="rrrrr", indent=""),
        )
    )


def _speed_rows(settings: Settings, runs: list[Run]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("threads", "test", *(f"{engine} tok/s" for engine in ENGINES), "ratio of pairs")
    ]
    lengths = {"decode": settings.decode_tokens, "prefill": settings.prefill_tokens}
    for test, length in lengths.items():
        for run in runs:
            speeds = (str(run.tok_s(test, engine)) for engine in ENGINES)
            rows.append((str(run.threads), f"{test} {length}", *speeds, str(run.ratio(test))))
    return rows


def _bandwidth_rows(checkpoint: Checkpoint, runs: list[Run]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("threads", *ENGINES, "memory", "buffer of the model's size")]
    for run in runs:
        used = [f"{_gb_s(checkpoint, run, engine):.1f}" for engine in ENGINES]
        roofs = [str(Spread.of(samples)) for samples in (run.memory_gb_s, run.model_gb_s)]
        rows.append((str(run.threads), *used, *roofs))
    return rows


def _gb_s(checkpoint: Checkpoint, run: Run, engine: str) -> float:
    """GB/s of weights while decoding."""
    return run.tok_s("decode", engine).median * checkpoint.bytes_per_token[engine] / 1e9


def as_json(
    checkpoint: Checkpoint, facts: dict[str, Any], settings: Settings, runs: list[Run]
) -> dict[str, Any]:
    """The report with all samples."""
    return {
        "machine": facts,
        "model": {
            "name": MODEL,
            "gguf_sha256": DEFAULT_MODELS[MODEL].member_sha256,
            "bytes_per_token": checkpoint.bytes_per_token,
        },
        "settings": asdict(settings),
        "runs": [
            {
                **asdict(run),
                "median_tok_s": {
                    test: {engine: run.tok_s(test, engine).median for engine in ENGINES}
                    for test in run.samples
                },
                "ratio": {test: asdict(run.ratio(test)) for test in run.samples},
                "decode_gb_s": {engine: _gb_s(checkpoint, run, engine) for engine in ENGINES},
            }
            for run in runs
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("-t", "--threads", type=positive_list, default=default_thread_counts(), metavar="1,2")
    add("--rounds", type=positive, default=5, help="pairs of samples (default 5)")
    add("--decode-tokens", type=positive, default=128, metavar="N", help="(default 128)")
    add("--prefill-tokens", type=positive, default=512, metavar="N", help="(default 512)")
    add("--tables", choices=("int8", "exact"), default="int8", help="tables of tmac_py")
    add("--json", type=Path, metavar="FILE", help="write the report with all samples here as well")
    add("--cache-dir", type=Path, metavar="DIR", help="where the model is kept")
    args = parser.parse_args(arguments)
    if find_spec("llama_cpp") is None:
        parser.exit(2, f"error: llama.cpp is missing; install it with: pip install {REQUIREMENT}\n")
    settings = Settings(args.rounds, args.decode_tokens, args.prefill_tokens, args.tables)
    facts = machine_facts()
    try:
        checkpoint = Checkpoint.fetch(args.cache_dir)
    except (TmacError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    load = OtherLoad()
    try:
        runs = [run(checkpoint, threads, settings) for threads in args.threads]
    except WorkerDied as error:
        parser.exit(1, f"error: an engine failed: {error}\n")
    facts["other_load_cpus"] = load.cpus()
    print(report(checkpoint, facts, settings, runs))
    if args.json:
        text = json.dumps(as_json(checkpoint, facts, settings, runs), indent=2)
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
