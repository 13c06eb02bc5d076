"""Perplexity and divergence from the float32 model: bits x group size x lookup tables.

    python bench/evaluation.py FOLDER

FOLDER is a Hugging Face folder of floats. Its float32 log probabilities along the text, by
tmac_py.converters.llama_forward, go to a file as ``tmac-eval --save-logits`` writes it; each
conversion is compared with them as ``tmac-eval --kl-base`` does. Embedding and lm_head have 8 bits.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from quantizers import bits_per_weight, dense_logits

from tmac_py import Model
from tmac_py.converters import convert, open_checkpoint
from tmac_py.evaluation import (
    ROWS,
    Chunking,
    ModelLogProbs,
    TextResult,
    encode_text,
    log_softmax,
    score_chunks,
    summarise,
)
from tmac_py.spec import Tables
from tmac_py.stored_logits import LogitsInfo, LogitsWriter, StoredLogits
from tmac_py.tokenizer import Tokenizer

TEXT = Path(__file__).with_suffix(".txt")
RUNS: dict[str, tuple[Tables, int]] = {
    "int8": ("int8", 16),
    "int8-prompt": ("int8", 256),
    "exact": ("exact", 256),
}
"""Tables, tokens at once. Exact tables give a prompt and an answer the same bits."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="Hugging Face folder of floats")
    parser.add_argument("--text", type=Path, default=TEXT, help="held-out text")
    parser.add_argument("-c", "--ctx-size", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--method", default="gptq", help="as for tmac-convert --quant")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["int8", "exact"])
    parser.add_argument(
        "--folder", type=Path, help="where conversions and float32 logits are kept, and taken from"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        base = folder / "float32.logits"
        if not base.exists():
            write_base(args.source, args.text, Chunking(args.ctx_size), base)
        stored = StoredLogits(base)
        print(f"{len(stored.ids)} tokens of {args.text.name}, {stored.chunks} chunks\n")
        print(
            "| bits | group | bits per weight | tables | perplexity | mean KL | 99 % | same top |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for bits in args.bits:
            for group in args.groups:
                path = folder / f"{args.method}-{bits}-{group}.lut"
                if not path.exists():
                    options = {"quant": args.method, "bits": bits, "group_size": group}
                    convert(args.source, path, **options, head_bits=8, asym=True)
                for name in args.runs:
                    tables, batch = RUNS[name]
                    cells = f"{bits} | {group} | {bits_per_weight(path):.2f} | {name}"
                    with Model.load(path, tables=tables) as model:
                        result = compare(model, stored, batch)
                    print(f"| {cells} | {row(result)} |", flush=True)
        assert result.divergence is not None
        print(f"\nfloat32: perplexity {result.divergence.base_ppl.value:.2f}")


def write_base(source: Path, text_file: Path, chunking: Chunking, out: Path) -> None:
    """The float32 model's log probabilities along a text."""
    checkpoint = open_checkpoint(source)
    tokenizer = Tokenizer(checkpoint.tokenizer, bos_id=checkpoint.config.bos_token_id)
    text = text_file.read_text(encoding="utf-8").removesuffix("\n")
    ids, bos = encode_text(tokenizer, text)
    chunks = chunking.count(len(ids))
    info = LogitsInfo(
        text=text,
        bos=bos,
        n_ctx=chunking.n_ctx,
        stride=chunking.stride,
        model=f"{source.name}, float32",
        fingerprint="",
        tables="float32",
        kv="float32",
        batch=chunking.size,
    )
    vocab = checkpoint.config.vocab_size
    with LogitsWriter(out, info, ids, chunks=chunks, vocab=vocab) as writer:
        for index in range(chunks):
            logits = dense_logits(checkpoint, chunking.chunk(ids, index, bos))
            scored = logits[chunking.first - 1 : -1]
            for start in range(0, len(scored), ROWS):
                writer.append(log_softmax(scored[start : start + ROWS]))


def compare(model: Model, stored: StoredLogits, batch: int) -> TextResult:
    """The model against the stored log probabilities, with so many tokens at once."""
    chunking, bos = stored.info.chunking, stored.info.bos
    ours = ModelLogProbs(model, chunking.size, batch=batch)
    ids = np.array(stored.ids)
    return summarise(
        list(score_chunks(ours, ids, chunking, range(stored.chunks), bos=bos, reference=stored))
    )


def row(result: TextResult) -> str:
    """Cells of one row, errors left out but that of the mean divergence."""
    divergence = result.divergence
    assert divergence is not None
    kld, ppl = divergence.kld, result.ppl
    return (
        f"{ppl.value:.2f} | {kld.value:.4f} ± {kld.error:.4f} | {divergence.kld_99:.3f} | "
        f"{divergence.same_top.value:.1%}"
    )


if __name__ == "__main__":
    main()
