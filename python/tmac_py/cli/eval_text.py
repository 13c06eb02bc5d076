"""``tmac eval`` on a text: perplexity, and divergence from a reference."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from tmac_py.cli.arguments import decode_text
from tmac_py.cli.eval_report import EvalProgress, text_report
from tmac_py.errors import ContextError, OptionError
from tmac_py.evaluation import (
    Chunking,
    ChunkScores,
    Ids,
    LogProbs,
    ModelLogProbs,
    check_vocabulary,
    encode_text,
    fingerprint,
    score_chunks,
    summarise,
)
from tmac_py.evaluation_state import StateFile
from tmac_py.model import Model
from tmac_py.stored_logits import LogitsInfo, LogitsWriter, StoredLogits


def evaluate_text(
    args: argparse.Namespace, model: Model, reference: Model | None
) -> tuple[dict[str, Any], str]:
    """Score the text that ``args`` name; returns JSON values and a report for people."""
    base = None if args.kl_base is None else StoredLogits(args.kl_base)
    cut = _cut_text(args, model, base)
    origin: dict[str, Any] | None = None
    if base is not None:
        origin = _check_base(args.kl_base, model, base, cut)
    elif reference is not None:
        origin = _check_reference(args, model, reference, cut)
    theirs: LogProbs | None = base
    if reference is not None:
        theirs = ModelLogProbs(reference, cut.chunking.size, batch=args.ubatch_size)
    records = _score(args, model, cut, theirs, origin)
    result = summarise(records)
    values: dict[str, Any] = {"n_ctx": cut.chunking.n_ctx, "stride": cut.chunking.stride}
    if base is not None:
        values |= {"reference": base.info.model, "reference_tables": base.info.tables}
    return {**values, **result.to_dict()}, text_report(result)


@dataclass(frozen=True)
class _CutText:
    """A text, its ids [n] and the token that starts each chunk, and how many chunks count."""

    text: str
    ids: Ids
    bos: int | None
    chunking: Chunking
    chunks: int

    def is_same(self, ids: Ids, bos: int | None) -> bool:
        """Whether another tokenizer has cut it into the same ids."""
        return bos == self.bos and ids.tolist() == self.ids.tolist()


def _cut_text(args: argparse.Namespace, model: Model, base: StoredLogits | None) -> _CutText:
    if args.file is None and base is not None:
        text = base.info.text
    else:
        text = decode_text(Path(args.file).read_bytes(), args.file)
    ids, bos = encode_text(model.tokenizer, text)
    chunking = _chunking(args, base)
    chunks = chunking.count(len(ids))
    if base is not None:
        chunks = min(chunks, base.chunks)
    if args.chunks is not None:
        chunks = min(chunks, args.chunks)
    if chunking.size > model.n_ctx:
        raise ContextError(
            f"chunks of {chunking.size} tokens do not fit: the model's context holds {model.n_ctx}"
        )
    return _CutText(text, ids, bos, chunking, chunks)


def _chunking(args: argparse.Namespace, base: StoredLogits | None) -> Chunking:
    """How to cut the text: as asked for, or as it was for the reference."""
    if base is None:
        return Chunking(args.ctx_size or 512, args.ppl_stride or 0)
    chunking = base.info.chunking
    for flag, given, stored in (
        ("-c", args.ctx_size, chunking.n_ctx),
        ("--ppl-stride", args.ppl_stride, chunking.stride),
    ):
        if given not in (None, stored):
            raise OptionError(f"{flag} is {given}, and {args.kl_base} was made with {stored}")
    return chunking


def _check_base(path: str, model: Model, base: StoredLogits, cut: _CutText) -> dict[str, Any]:
    """What the stored log probabilities are of."""
    check_vocabulary(model, base.vocab, path)
    if not cut.is_same(base.ids, base.info.bos):
        raise OptionError(f"{path}: made of another text, or with another tokenizer, than this")
    return asdict(base.info)


def _check_reference(
    args: argparse.Namespace, model: Model, reference: Model, cut: _CutText
) -> dict[str, Any]:
    """What the reference is."""
    check_vocabulary(model, reference.config.vocab_size, args.reference)
    if not cut.is_same(*encode_text(reference.tokenizer, cut.text)):
        raise OptionError(f"{args.reference}: its tokenizer cuts the text into other tokens")
    if cut.chunking.size > reference.n_ctx:
        raise ContextError(
            f"chunks of {cut.chunking.size} tokens do not fit: the context of {args.reference} "
            f"holds {reference.n_ctx}"
        )
    return {"model": fingerprint(reference.file), "tables": reference.tables}


def _score(
    args: argparse.Namespace,
    model: Model,
    cut: _CutText,
    theirs: LogProbs | None,
    origin: dict[str, Any] | None,
) -> list[ChunkScores]:
    """The scores of all chunks, those that a state file holds and the rest."""
    task = {
        "kind": "text",
        "model": fingerprint(model.file),
        "tables": model.tables,
        "kv": args.kv,
        "batch": args.ubatch_size,
        "text": xxhash.xxh3_128_hexdigest(cut.ids.tobytes()),
        "n_ctx": cut.chunking.n_ctx,
        "stride": cut.chunking.stride,
        "chunks": cut.chunks,
        "reference": None if origin is None else _checksum(origin),
    }

    def parse(row: Any) -> ChunkScores:
        scores = ChunkScores(**row)
        scores.check(cut.chunking.scored, base=theirs is not None)
        return scores

    resumable = args.resume is not None
    with ExitStack() as stack:
        state = stack.enter_context(StateFile(args.resume, task, parse, cut.chunks))
        done = len(state.records)
        writer = None
        if args.save_logits is not None:
            writer = stack.enter_context(_writer(args, model, cut, done))
        progress = stack.enter_context(EvalProgress("chunks", cut.chunks, quiet=args.quiet))
        for record in state.records:
            progress.add_nll(record.nll)
        try:
            for scores in score_chunks(
                ModelLogProbs(model, cut.chunking.size, args.kv, args.ubatch_size),
                cut.ids,
                cut.chunking,
                range(done, cut.chunks),
                bos=cut.bos,
                reference=theirs,
                keep=None if writer is None else writer.append,
            ):
                if writer is not None:
                    writer.flush()
                state.append(scores)
                progress.add_nll(scores.nll)
        except KeyboardInterrupt:
            progress.stopped(resumable=resumable)
            raise
    return state.records


def _checksum(origin: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(origin).encode())


def _writer(args: argparse.Namespace, model: Model, cut: _CutText, done: int) -> LogitsWriter:
    info = LogitsInfo(
        text=cut.text,
        bos=cut.bos,
        n_ctx=cut.chunking.n_ctx,
        stride=cut.chunking.stride,
        model=model.path.name,
        fingerprint=fingerprint(model.file),
        tables=model.tables,
        kv=args.kv,
        batch=args.ubatch_size,
    )
    return LogitsWriter(
        args.save_logits,
        info,
        cut.ids,
        chunks=cut.chunks,
        vocab=model.config.vocab_size,
        done=done,
        keep=args.resume is not None,
    )
