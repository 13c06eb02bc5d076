"""Multiple-choice questions: scores by definition, flips, and what files may hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_model as tiny
from test_evaluation import log_probs, milder
from tmac_py import Model
from tmac_py.errors import ContextError, ModelFileError
from tmac_py.multiple_choice import (
    Answers,
    ChoiceScorer,
    Prompt,
    Question,
    encode_question,
    read_questions,
    summarise_answers,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tiny.write_tiny_model(tmp_path_factory.mktemp("choice") / "tiny.lut", change=milder)
    with Model.load(path, threads=1, tables="exact") as opened:
        yield opened


QUESTIONS = [
    Question("the cat sat", ("on the mat", "on the CPU there", "x"), 0),
    Question("Hello world,", (" hello there!", " low-bit models"), 1),
    Question("models on ", ("the mat", "the CPU"), 1),
    Question("a" * 30, ("b", "c"), 1),
]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.context[:8])
@pytest.mark.parametrize("batch", [256, 3])
def test_scores_are_log_likelihoods_after_the_question(
    model: Model, question: Question, batch: int
) -> None:
    encode = model.tokenizer.encode
    prompt = encode_question(model.tokenizer, question)
    scores = ChoiceScorer(model, prompt.size, batch=batch).score(prompt)
    stem = encode(question.context.rstrip())
    assert prompt.shared == stem
    for choice, ids, score in zip(question.choices, prompt.choices, scores, strict=True):
        text = question.context.rstrip() + " " + choice.lstrip()
        whole = encode(text)
        assert prompt.shared + ids == whole
        rows = log_probs(model.logits(whole))
        want = sum(rows[i - 1, whole[i]] for i in range(len(stem), len(whole)))
        assert score == pytest.approx(want, rel=1e-9)


def test_a_cache_of_codes_forgets_more_than_the_choice(tmp_path: Path) -> None:
    """The question's last block is computed again after a long choice."""
    ids = np.random.default_rng(0).integers(3, tiny.VOCAB, 500).tolist()
    path = tiny.write_tiny_model(
        tmp_path / "long.lut", change=milder, max_position_embeddings=len(ids)
    )
    with Model.load(path, threads=1, tables="exact") as model:
        choices = [ids[100:], ids[200:210]]
        scorer = ChoiceScorer(model, len(ids), kv="int4", batch=64)
        scores = scorer.score(Prompt(ids[:100], choices))
        assert scores == scorer.score(Prompt(ids[:100], choices[::-1]))[::-1]


def test_a_choice_may_change_how_the_question_ends(model: Model) -> None:
    """Byte-level BPE joins "t" and "he": what the choices do not share counts for each."""
    question = Question("on t", ("he mat", "x"), 0)
    glued = Question("on\u00a0t", ("\u00a0he", "\u00a0x"), 0)
    for one in (question, glued):
        prompt = encode_question(model.tokenizer, one)
        assert prompt.shared
        assert all(prompt.choices)
    whole = model.tokenizer.encode("\u00e9")
    assert len(whole) == 2  # two bytes, no merge
    same = encode_question(model.tokenizer, Question("the cat", (" sat", " sat on"), 0))
    assert len(same.choices[0]) < len(same.choices[1])


def test_nothing_before_the_choices(model: Model) -> None:
    with pytest.raises(ModelFileError, match="line 7: the model sees nothing"):
        encode_question(model.tokenizer, Question("", ("a", "b"), 0, line=7))


def test_a_question_that_does_not_fit(model: Model) -> None:
    with pytest.raises(ContextError, match="has 97 tokens, the model's context holds 96"):
        ChoiceScorer(model, 97)


def test_flips_are_counted_by_hand() -> None:
    """Eight questions; correct are choices of index 0, and of equal length but in the last two."""
    equal, unequal = ("aa", "bb", "cc"), ("aaaa", "bb", "cc")
    questions = [Question("q", equal, 0)] * 6 + [Question("q", unequal, 0)] * 2
    first, second, third = [-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0], [-3.0, -2.0, -1.0]
    # Longest first choice: less likely as a whole, likelier per character.
    long = [-2.0, -1.5, -9.0]
    answers = [
        Answers(first, first),  # correct, stays
        Answers(first, second),  # to correct
        Answers(first, third),  # to correct
        Answers(second, first),  # to incorrect
        Answers(second, third),  # another incorrect one
        Answers(third, third),  # incorrect, stays
        Answers(long, first),  # to incorrect, but normalised it stays correct
        Answers(long, long),  # incorrect and normalised correct in both
    ]
    result = summarise_answers(questions, answers)
    flips = result.flips
    assert flips is not None
    assert (result.questions, result.acc.value, result.acc_norm.value) == (8, 3 / 8, 5 / 8)
    assert (flips.base_acc.value, flips.base_acc_norm.value) == (3 / 8, 4 / 8)
    assert (flips.flips.value, flips.to_incorrect, flips.to_correct) == (4 / 8, 2 / 8, 2 / 8)
    assert (flips.flips_norm.value, flips.changed.value) == (3 / 8, 5 / 8)
    error = np.sqrt(3 / 8 * 5 / 8 / 7)
    assert result.acc.error == pytest.approx(error)
    alone = summarise_answers(questions, [Answers(a.scores, None) for a in answers])
    assert (alone.acc, alone.flips) == (result.acc, None)


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_names_that_other_tools_use(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"question": "Q", "choices": ["a", "b"], "answer": 1, "id": "ignored"},
        {"context": "Q", "choices": ["a", "b"], "gold": 1},
        "",
        {"ctx": "Q", "endings": ["a", "b"], "label": "1"},
        {"query": "Q", "choices": ["a", "b"], "gold": 1},
        {"question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
    )
    questions = read_questions(path)
    assert [(q.context, q.choices, q.answer) for q in questions] == [("Q", ("a", "b"), 1)] * 6
    assert [q.line for q in questions] == [1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("{", "line 2: "),
        ("[" * 100_000, "line 2: "),
        ([1], "not a JSON object"),
        ({"choices": ["a", "b"], "answer": 0}, '"context" (or question, ctx, query, prompt)'),
        ({"question": 5, "choices": ["a", "b"], "answer": 0}, "must be a text"),
        ({"question": "q", "answer": 0}, "must be two texts or more"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "must be two texts or more"),
        ({"question": "q", "choices": ["a", " "], "answer": 0}, "must be two texts or more"),
        ({"question": "q", "choices": {"text": "ab"}, "answer": 0}, "must be two texts or more"),
        ({"question": "q", "choices": ["a", "b"]}, '"answer" (or label, gold, answerKey) is None'),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "is 2; allowed: 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": -1}, "is -1"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "is True"),
        ({"question": "q", "choices": ["a", "b"], "answer": "B"}, "is 'B'"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, row: Any, text: str) -> None:
    good = {"question": "q", "choices": ["a", "b"], "answer": 0}
    path = write(tmp_path / "q.jsonl", good, row)
    with pytest.raises(ModelFileError) as error:
        read_questions(path)
    assert f"{path}: line 2: " in str(error.value)
    assert text in str(error.value)


def test_files_without_questions(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no questions"):
        read_questions(write(tmp_path / "q.jsonl", ""))
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelFileError, match="not UTF-8"):
        read_questions(tmp_path / "q.jsonl")
