"""What building the tables takes of a product with one vector.

The core does not build tables without a product, so a matrix of 32 rows stands for it: one tile,
whose table build is that of any m. The share is thus too high by that tile and the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alternate import Settings, alternate
from contestants import Kernel, Tables
from measure import Spread
from packed_copies import Copies, packed_matrix

from tmac_py import _core

SIZE = 4096
TILE_ROWS = 32


@dataclass(frozen=True)
class TableBuild:
    """One kernel with m = k = 4096, weights from memory."""

    encoding: str
    isa: str
    tables: Tables
    threads: int
    tile_seconds: float
    product_seconds: float
    share: Spread  # of neighbouring windows


def table_build(
    encoding: str,
    *,
    group_size: int,
    isas: Sequence[str],
    tables: Sequence[Tables],
    pools: dict[int, _core.ThreadPool],
    nbytes: int,
    huge_pages: bool,
    settings: Settings,
) -> list[TableBuild]:
    """Of each instruction set, kind of tables and number of threads."""
    tile = Copies(packed_matrix(encoding, TILE_ROWS, SIZE, group_size=group_size), nbytes=0)
    whole = Copies(
        packed_matrix(encoding, SIZE, SIZE, group_size=group_size),
        nbytes=nbytes,
        huge_pages=huge_pages,
    )
    found = []
    for threads in pools:
        for isa in isas:
            for kind in tables:
                small, large = alternate(
                    [Kernel(copies, pools, isa=isa, tables=kind) for copies in (tile, whole)],
                    [],
                    work=SIZE * SIZE,
                    n=1,
                    threads=threads,
                    roofs=None,
                    settings=settings,
                )
                pairs = zip(small.seconds, large.seconds, strict=True)
                found.append(
                    TableBuild(
                        encoding=encoding,
                        isa=isa,
                        tables=kind,
                        threads=threads,
                        tile_seconds=small.spread.median,
                        product_seconds=large.spread.median,
                        share=Spread.of([a / b for a, b in pairs]),
                    )
                )
    return found
