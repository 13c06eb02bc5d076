"""Texts that one client wants embedded, in the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tmac_py.embedding import Embedder, Vectors

EmbeddingSink = Callable[[list[Vectors] | Exception], None]
"""Gets all vectors or an error, from the engine's thread."""


@dataclass(eq=False)
class EmbeddingJob:
    """Such a request under way.

    Attributes:
        work: what is done and what is left.
        sink: gets the result.
        client: whose request it is.
        cancelled: set by the engine's ``cancel``.
    """

    work: Embedder
    sink: EmbeddingSink
    client: str = ""
    cancelled: bool = False

    def tell(self, event: list[Vectors] | Exception) -> None:
        """Hand the result to the client. A sink that fails has no client any more."""
        try:
            self.sink(event)
        except Exception:
            self.cancelled = True
