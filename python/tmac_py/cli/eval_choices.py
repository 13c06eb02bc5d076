"""``tmac eval --multiple-choice``: accuracy, and flipped answers against a reference."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict
from itertools import count
from typing import Any

import xxhash

from tmac_py.cli.eval_report import EvalProgress, choice_report
from tmac_py.evaluation import fingerprint
from tmac_py.evaluation_state import StateFile
from tmac_py.model import Model
from tmac_py.multiple_choice import (
    Answers,
    ChoiceScorer,
    Question,
    encode_question,
    likeliest,
    read_questions,
    summarise_answers,
)


def evaluate_choices(
    args: argparse.Namespace, model: Model, reference: Model | None
) -> tuple[dict[str, Any], str]:
    """Ask the questions that ``args`` name; returns JSON values and a report for people."""
    questions = read_questions(args.multiple_choice)[: args.chunks]
    ours = _Asked(model, questions, args.kv, args.ubatch_size)
    theirs = None if reference is None else _Asked(reference, questions, "f16", args.ubatch_size)
    task = {
        "kind": "multiple choice",
        "model": fingerprint(model.file),
        "tables": model.tables,
        "kv": args.kv,
        "batch": args.ubatch_size,
        "questions": _checksum(questions),
        "reference": None
        if reference is None
        else {"model": fingerprint(reference.file), "tables": reference.tables},
    }
    number = count()

    def parse(row: Any) -> Answers:
        answers = Answers(**row)
        answers.check(len(questions[next(number)].choices), base=theirs is not None)
        return answers

    with ExitStack() as stack:
        state = stack.enter_context(StateFile(args.resume, task, parse, len(questions)))
        progress = stack.enter_context(EvalProgress("questions", len(questions), quiet=args.quiet))
        for question, answers in zip(questions, state.records, strict=False):
            progress.add_answer(correct=_correct(question, answers))
        try:
            for i in range(len(state.records), len(questions)):
                answers = Answers(ours.score(i), None if theirs is None else theirs.score(i))
                state.append(answers)
                progress.add_answer(correct=_correct(questions[i], answers))
        except KeyboardInterrupt:
            progress.stopped(resumable=args.resume is not None)
            raise
    result = summarise_answers(questions, state.records)
    return result.to_dict(), choice_report(result)


def _checksum(questions: list[Question]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([asdict(q) for q in questions]).encode())


class _Asked:
    """The questions as one model reads them."""

    def __init__(self, model: Model, questions: list[Question], kv: str, batch: int) -> None:
        self._prompts = [encode_question(model.tokenizer, question) for question in questions]
        self._scorer = ChoiceScorer(model, max(prompt.size for prompt in self._prompts), kv, batch)

    def score(self, index: int) -> list[float]:
        """Log likelihoods of the choices of one question."""
        return self._scorer.score(self._prompts[index])


def _correct(question: Question, answers: Answers) -> bool:
    return likeliest(question, answers.scores)[0] == question.answer
