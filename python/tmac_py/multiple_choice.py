"""Multiple-choice questions: which choice a model holds for likeliest, and what flips.

Scores are log likelihoods of the choices after the question, as in EleutherAI's evaluation harness.
Accuracies of two models may be equal while they answer differently: flips, the answers that turn
from correct to incorrect or back, show it (Dutta et al., "Accuracy is Not All You Need", 2024).
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tmac_py.decoding import PREFILL_CHUNK
from tmac_py.errors import ContextError, ModelFileError
from tmac_py.evaluation import Estimate, log_softmax, slices
from tmac_py.model import Model
from tmac_py.tokenizer import Tokenizer

_CONTEXTS = ("context", "question", "ctx", "query", "prompt")
_CHOICES = ("choices", "endings")
_ANSWERS = ("answer", "label", "gold", "answerKey")


@dataclass(frozen=True)
class Question:
    """One question; ``answer`` is the index of the correct choice, ``line`` that of the file."""

    context: str
    choices: tuple[str, ...]
    answer: int
    line: int = 0


@dataclass(frozen=True)
class Prompt:
    """Ids of a question: what all choices share, and what each adds, at least one id."""

    shared: list[int]
    choices: list[list[int]]

    @property
    def size(self) -> int:
        """Tokens of context that the longest choice needs."""
        return len(self.shared) + max(len(ids) for ids in self.choices)


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file of JSON lines.

    Each line is an object with a text ("context", or "question", "ctx", "query", "prompt"),
    "choices" (or "endings"): two texts or more, or {"text": texts, "label": names}, and "answer"
    (or "label", "gold", "answerKey"): the index of the right one, from 0, or its name.

    Raises:
        ModelFileError: a line is something else, or there is none; names file and line.
    """
    questions = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: not UTF-8 text (offset {error.start:,})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                questions.append(_parse(json.loads(line), number))
            except (ValueError, RecursionError) as error:
                raise ModelFileError(f"{path}: line {number}: {error}") from error
    if not questions:
        raise ModelFileError(f"{path}: no questions; each line must be a JSON object")
    return questions


def _parse(row: Any, line: int) -> Question:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    context = _find(row, _CONTEXTS)
    if not isinstance(context, str):
        raise ValueError(f"{_named(_CONTEXTS)} must be a text")
    choices: Any = _find(row, _CHOICES)
    names: Any = None
    if isinstance(choices, dict):
        choices, names = choices.get("text"), choices.get("label")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise ValueError(f"{_named(_CHOICES)} must be two texts or more")
    answer = _find(row, _ANSWERS)
    if isinstance(names, list) and answer in names:
        answer = names.index(answer)
    elif isinstance(answer, str) and answer.isascii() and answer.isdecimal():
        answer = int(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f"{_named(_ANSWERS)} is {reprlib.repr(answer)}; "
            f"allowed: 0 to {len(choices) - 1}, or a label of the choices"
        )
    return Question(context, tuple(choices), answer, line)


def _find(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _named(names: Sequence[str]) -> str:
    return f'"{names[0]}" (or {", ".join(names[1:])})'


def encode_question(tokenizer: Tokenizer, question: Question) -> Prompt:
    """Ids of question and choices, with one space between them unless there is one.

    Where a choice changes how the end of the question is cut into tokens, that end counts as part
    of all choices.

    Raises:
        ModelFileError: nothing is left in front of the choices.
    """
    context = question.context.rstrip()
    before = question.context[len(context) :]
    alone = tokenizer.encode(context)
    wholes = []
    for choice in question.choices:
        space = before or ("" if choice[0].isspace() or not context else " ")
        wholes.append(tokenizer.encode(f"{context}{space}{choice}"))
    n = min(_common(alone, whole) for whole in wholes)
    n = min(n, *(len(whole) - 1 for whole in wholes))
    if n < 1:
        raise ModelFileError(f"line {question.line}: the model sees nothing before the choices")
    return Prompt(wholes[0][:n], [whole[n:] for whole in wholes])


def _common(a: list[int], b: list[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


class ChoiceScorer:
    """Log likelihoods of choices, for prompts of up to ``size`` tokens; arguments as ModelLogProbs.

    The question runs through the model once; each choice follows it in the same KV cache.

    Raises:
        ContextError: the model's context is smaller.
    """

    def __init__(
        self, model: Model, size: int, kv: str = "f16", batch: int = PREFILL_CHUNK
    ) -> None:
        if size > model.n_ctx:
            raise ContextError(
                f"the longest question has {size} tokens, the model's context holds {model.n_ctx}"
            )
        self._model = model
        self._batch = batch
        self._cache = model.new_cache(size, kv)

    def score(self, prompt: Prompt) -> list[float]:
        """The log likelihood of each choice."""
        forward, cache = self._model.forward, self._cache
        cache.truncate(0)
        for part in slices(np.array(prompt.shared, np.int32), self._batch):
            last = forward(part, cache)
        start = log_softmax(last)
        scores = []
        for ids in prompt.choices:
            score = float(start[ids[0]])
            if len(ids) > 1:
                cache.truncate(len(prompt.shared))
                again = np.array(prompt.shared[cache.pos :], np.int32)
                for part in slices(again, self._batch):
                    forward(part, cache)
                given = slices(np.array(ids[:-1], np.int32), self._batch)
                rows = np.concatenate([forward(part, cache, "all") for part in given])
                score += float(log_softmax(rows)[np.arange(len(rows)), ids[1:]].sum())
            scores.append(score)
        return scores


@dataclass(frozen=True)
class Answers:
    """Log likelihoods of the choices of one question, by the model and by the reference, if any."""

    scores: list[float]
    base: list[float] | None

    def check(self, choices: int, *, base: bool) -> None:
        """ValueError unless there are as many numbers as ``choices``."""
        lists = [self.scores] if self.base is None else [self.scores, self.base]
        if base != (self.base is not None) or any(len(one) != choices for one in lists):
            raise ValueError("not the scores of this question")
        if not all(type(x) is float for one in lists for x in one):
            raise ValueError("scores must be numbers")


@dataclass(frozen=True)
class Flips:
    """Against a reference; parts of all questions.

    Attributes:
        base_acc, base_acc_norm: accuracies of the reference.
        flips, flips_norm: answers that turn from correct to incorrect or from incorrect to correct.
        to_incorrect, to_correct: the two kinds of ``flips``.
        changed: answers that are another choice, correct or not.
    """

    base_acc: Estimate
    base_acc_norm: Estimate
    flips: Estimate
    flips_norm: Estimate
    to_incorrect: float
    to_correct: float
    changed: Estimate


@dataclass(frozen=True)
class ChoiceResult:
    """Accuracy by log likelihood, and by log likelihood per character of the choice (norm)."""

    questions: int
    acc: Estimate
    acc_norm: Estimate
    flips: Flips | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def summarise_answers(questions: Sequence[Question], answers: Sequence[Answers]) -> ChoiceResult:
    """The numbers of the first ``len(answers)`` questions, at least one."""
    asked = questions[: len(answers)]
    right = np.array([question.answer for question in asked])
    ours = [likeliest(q, a.scores) for q, a in zip(asked, answers, strict=True)]
    best, best_norm = (np.array(column) for column in zip(*ours, strict=True))
    flips = None
    if answers[0].base is not None:
        theirs = [likeliest(q, a.base or []) for q, a in zip(asked, answers, strict=True)]
        base, base_norm = (np.array(column) for column in zip(*theirs, strict=True))
        was, now = base == right, best == right
        flips = Flips(
            base_acc=_part(was),
            base_acc_norm=_part(base_norm == right),
            flips=_part(was != now),
            flips_norm=_part((base_norm == right) != (best_norm == right)),
            to_incorrect=float((was & ~now).mean()),
            to_correct=float((~was & now).mean()),
            changed=_part(base != best),
        )
    return ChoiceResult(len(answers), _part(best == right), _part(best_norm == right), flips)


def likeliest(question: Question, scores: Sequence[float]) -> tuple[int, int]:
    """Index of the likeliest choice, and of the one that is likeliest per character."""
    norm = [s / len(choice) for s, choice in zip(scores, question.choices, strict=True)]
    return int(np.argmax(scores)), int(np.argmax(norm))


def _part(hits: Any) -> Estimate:
    return Estimate.of(np.asarray(hits, np.float64))
