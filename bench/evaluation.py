"""What quantisation costs the default model: bits x group size x lookup tables.

    python bench/evaluation.py SOURCE

SOURCE is a Hugging Face folder of floats, or a GGUF file, whose codes are then turned to floats
first. Reference is the float32 model, by tmac_py.converters.llama_forward: its log probabilities
along the text, kept in a file as ``tmac-eval --save-logits`` writes it, and its answers to the
questions. Each conversion is compared with them as ``tmac-eval --kl-base`` and
``--multiple-choice`` do. Embedding and lm_head have 8 bits. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from quantizers import bits_per_weight, dense_logits, write_dense

from tmac_py import Model
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters.checkpoint import Checkpoint
from tmac_py.converters.llama_forward import LlamaForward
from tmac_py.converters.model_layers import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    as_floats,
    embed,
    find,
    layers_of,
)
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
from tmac_py.multiple_choice import (
    Answers,
    ChoiceResult,
    ChoiceScorer,
    Prompt,
    Question,
    encode_question,
    read_questions,
    summarise_answers,
)
from tmac_py.spec import Tables
from tmac_py.stored_logits import LogitsInfo, LogitsWriter, StoredLogits
from tmac_py.tokenizer import Tokenizer

TEXT = Path(__file__).with_suffix(".txt")
QUESTIONS = Path(__file__).with_name("evaluation_questions.jsonl")
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
    parser.add_argument("source", type=Path, help="Hugging Face folder of floats, or GGUF file")
    parser.add_argument("--text", type=Path, default=TEXT, help="held-out text")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="as for tmac-eval")
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
        source = args.source
        if source.is_file():
            source = folder / f"{source.stem}-float32"
            if not source.exists():
                write_dense(args.source, source)
        base = folder / "float32.logits"
        if not base.exists():
            write_base(source, args.text, Chunking(args.ctx_size), base)
        stored = StoredLogits(base)
        quiz = Quiz(source, args.questions)
        print(
            f"{len(stored.ids)} tokens of {args.text.name}, {stored.chunks} chunks; "
            f"{len(quiz.questions)} questions of {args.questions.name}\n"
        )
        print(
            "| bits | group | bits per weight | tables | perplexity | mean KLD | 99 % KLD | "
            f"same top | accuracy | flips |\n|{'---|' * 10}",
            flush=True,
        )
        for bits in args.bits:
            for group in args.groups:
                path = folder / f"{args.method}-{bits}-{group}.lut"
                if not path.exists():
                    options = {"quant": args.method, "bits": bits, "group_size": group}
                    convert(source, path, **options, head_bits=8, asym=True)
                for name in args.runs:
                    tables, batch = RUNS[name]
                    cells = f"{bits} | {group} | {bits_per_weight(path):.2f} | {name}"
                    with Model.load(path, tables=tables) as model:
                        result = compare(model, stored, batch)
                        answers = quiz.ask(model, batch)
                    print(f"| {cells} | {row(result, answers)} |", flush=True)
        assert result.divergence is not None
        assert answers.flips is not None
        print(
            f"\nfloat32: perplexity {result.divergence.base_ppl.value:.2f}, "
            f"accuracy {answers.flips.base_acc.value:.1%}"
        )


class Quiz:
    """Questions, and what the float32 model says to them."""

    def __init__(self, source: Path, file: Path) -> None:
        checkpoint = open_checkpoint(source)
        tokenizer = Tokenizer(checkpoint.tokenizer, bos_id=checkpoint.config.bos_token_id)
        self.questions: list[Question] = read_questions(file)
        self._prompts = [encode_question(tokenizer, question) for question in self.questions]
        self._base = dense_scores(checkpoint, self._prompts)

    def ask(self, model: Model, batch: int) -> ChoiceResult:
        """Accuracy and flips of a model with the same tokenizer."""
        scorer = ChoiceScorer(model, max(prompt.size for prompt in self._prompts), batch=batch)
        scores = [scorer.score(prompt) for prompt in self._prompts]
        answers = [Answers(ours, base) for ours, base in zip(scores, self._base, strict=True)]
        return summarise_answers(self.questions, answers)


def dense_scores(checkpoint: Checkpoint, prompts: list[Prompt]) -> list[list[float]]:
    """Log likelihoods of all choices by the float32 model; texts of equal length go together."""
    config = checkpoint.config
    groups: dict[int, list[tuple[int, int]]] = {}
    for i, prompt in enumerate(prompts):
        for j, choice in enumerate(prompt.choices):
            groups.setdefault(len(prompt.shared) + len(choice), []).append((i, j))
    table = find(checkpoint, EMBEDDING).load()
    hidden = {
        length: embed(
            table, np.array([prompts[i].shared + prompts[i].choices[j] for i, j in group], np.int32)
        )
        for length, group in groups.items()
    }
    forwards = {length: LlamaForward(config, length) for length in groups}
    for tensors in layers_of(checkpoint):
        layer = {name: as_floats(tensor.load()) for name, tensor in tensors.items()}
        for length, forward in forwards.items():
            forward.run_layer(layer, hidden[length], lambda _stage, _x: None)
    norm = as_floats(find(checkpoint, FINAL_NORM).load())
    head = as_floats(find(checkpoint, EMBEDDING if config.tie_word_embeddings else LM_HEAD).load())
    scores = [[0.0] * len(prompt.choices) for prompt in prompts]
    for length, group in groups.items():
        rows = forwards[length].normalise(hidden[length], norm)
        for (i, j), text in zip(group, rows, strict=True):
            choice = prompts[i].choices[j]
            logits = text[length - len(choice) - 1 : -1] @ head.T
            scores[i][j] = float(log_softmax(logits)[np.arange(len(choice)), choice].sum())
    return scores


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


def row(result: TextResult, answers: ChoiceResult) -> str:
    """Cells of one row."""
    divergence, flips = result.divergence, answers.flips
    assert divergence is not None
    assert flips is not None
    return (
        f"{result.ppl.value:.2f} | {divergence.kld.value:.4f} | {divergence.kld_99:.3f} | "
        f"{100 * divergence.same_top.value:.1f} % | "
        f"{100 * answers.acc.value:.1f} % | {100 * flips.flips.value:.1f} %"
    )


if __name__ == "__main__":
    main()
