"""Progress on stderr: a bar on a terminal, one line a phase elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_LABELS = {
    "wait": "Waiting for another process that fetches or converts the model",
    "download": "Downloading",
    "check": "Checking",
    "unpack": "Unpacking",
    "convert": "Converting",
}


class PhaseProgress:
    """Shows the phases of tmac_py.modelcache.PHASES; call it as a ``progress``."""

    def __init__(self) -> None:
        self._phase = ""
        self._bar: tqdm[Any] | None = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` of this phase is done."""
        if phase != self._phase:
            self.close()
            self._phase = phase
            label = _LABELS.get(phase, phase)
            if total and sys.stderr.isatty():
                from tqdm import tqdm  # takes a while to import, and most runs need no bar

                unit = "" if phase == "convert" else "B"
                self._bar = tqdm(
                    desc=label.ljust(11), total=total, unit=unit, unit_scale=True, leave=True
                )
            else:
                print(f"{label} ...", file=sys.stderr, flush=True)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the current bar and its line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> PhaseProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
