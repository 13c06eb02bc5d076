"""What ``tmac eval`` shows: running estimates on stderr, and the report at the end."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from tmac_py.evaluation import Divergence, Estimate, TextResult
from tmac_py.multiple_choice import ChoiceResult


class EvalProgress:
    """Running estimates: a bar on a terminal, elsewhere ``[1]12.3456,[2]...`` as llama-perplexity.

    Call one of the ``add`` methods for each of ``total`` ``unit`` (chunks or questions).
    """

    def __init__(self, unit: str, total: int, *, quiet: bool) -> None:
        self._unit, self._total, self._quiet = unit, total, quiet
        self._sum, self._n, self._done = 0.0, 0, 0
        self._bar: tqdm[Any] | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, unit=f" {unit}", leave=False)

    def add_nll(self, nll: Sequence[float]) -> None:
        """A chunk with these negative log likelihoods is done."""
        self._sum += sum(nll)
        self._n += len(nll)
        mean = self._sum / self._n
        self._step("PPL", math.exp(mean) if mean < 700 else math.inf)

    def add_answer(self, *, correct: bool) -> None:
        """A question is answered."""
        self._sum += correct
        self._n += 1
        self._step("accuracy %", 100 * self._sum / self._n)

    def stopped(self, *, resumable: bool) -> None:
        """Say how far the evaluation came before Ctrl-C."""
        self._end_line()
        if not self._quiet:
            more = "; the same command goes on from here" if resumable else ""
            text = f"stopped after {self._done} of {self._total} {self._unit}{more}"
            print(text, file=sys.stderr)

    def _step(self, name: str, value: float) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(f"{name} {value:.4f}", refresh=False)
            self._bar.update()
        elif not self._quiet:
            print(f"[{self._done}]{value:.4f},", end="", file=sys.stderr, flush=True)

    def _end_line(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self._quiet and self._done:
            print(file=sys.stderr)

    def __enter__(self) -> EvalProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not KeyboardInterrupt:
            self._end_line()


def text_report(result: TextResult) -> str:
    """Perplexity, and divergence under llama-perplexity's names."""
    lines = []
    if result.divergence is not None:
        lines = [*_divergence_lines(result, result.divergence), ""]
    ppl = result.ppl
    lines.append(f"Final estimate: PPL = {ppl.value:.4f} +/- {ppl.error:.5f}")
    return "\n".join(lines)


def _divergence_lines(result: TextResult, divergence: Divergence) -> list[str]:
    ratio = divergence.log_ppl_ratio
    return [
        f"====== Perplexity: {result.tokens} tokens of {result.chunks} chunks ======",
        _line("Mean PPL(Q)", result.ppl, 4),
        _line("Mean PPL(base)", divergence.base_ppl, 4),
        _line("Mean ln(PPL(Q)/PPL(base))", ratio, 6),
        _line("Mean PPL(Q)/PPL(base)", ratio.exp(), 6),
        "====== KL divergence ======",
        _line("Mean KLD", divergence.kld, 6),
        _line("Maximum KLD", divergence.kld_max, 6),
        _line("99.9% KLD", divergence.kld_999, 6),
        _line("99.0% KLD", divergence.kld_99, 6),
        _line("Median KLD", divergence.kld_median, 6),
        "====== Token probabilities ======",
        _line("Mean Δp", divergence.delta_p, 3, percent=True),
        _line("RMS Δp", divergence.rms_delta_p, 3, percent=True),
        _line("Same top p", divergence.same_top, 3, percent=True),
    ]


def choice_report(result: ChoiceResult) -> str:
    """Accuracies, and flips where there is a reference."""
    lines = [
        f"====== {result.questions} questions ======",
        _line("Accuracy", result.acc, 2, percent=True),
        _line("Accuracy, normalised", result.acc_norm, 2, percent=True),
    ]
    if (flips := result.flips) is not None:
        lines += [
            "====== Against the reference ======",
            _line("Its accuracy", flips.base_acc, 2, percent=True),
            _line("Its accuracy, normalised", flips.base_acc_norm, 2, percent=True),
            _line("Flips", flips.flips, 2, percent=True),
            _line("  correct -> incorrect", flips.to_incorrect, 2, percent=True),
            _line("  incorrect -> correct", flips.to_correct, 2, percent=True),
            _line("Flips, normalised", flips.flips_norm, 2, percent=True),
            _line("Other choice", flips.changed, 2, percent=True),
        ]
    return "\n".join(lines)


def _line(label: str, value: float | Estimate, digits: int, *, percent: bool = False) -> str:
    factor, unit = (100, " %") if percent else (1, "")
    estimate = value if isinstance(value, Estimate) else Estimate(value, 0.0)
    text = f"{label:<26}: {factor * estimate.value:10.{digits}f}"
    if isinstance(value, Estimate):
        text += f" ± {factor * estimate.error:.{digits}f}"
    return text + unit
