"""The same model for each engine: from one file, or random weights in every type of the bits."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray
from peer_models import write_gguf
from peer_types import TYPE_IDS, TYPES_OF_ENCODING
from worker_process import WorkerDied, WorkerProcess

from tmac_py.benchmark import layer_products, weight_bytes
from tmac_py.cli.progress import PhaseProgress
from tmac_py.default_model import DEFAULT_MODELS, cached_path, ensure_model, fetch_gguf
from tmac_py.errors import OptionError
from tmac_py.lutfile import LutFile
from tmac_py.synthetic import parse_synthetic, write_synthetic

MODEL = "smollm2-135m"
OURS = "tmac_py"


@dataclass(frozen=True)
class Contender:
    """One engine with one file."""

    party: str  # OURS or the peer's name
    kernel: str  # tables or type
    engine: str  # of engine_worker.ENGINES
    path: Path
    bytes_per_token: int  # matrices that one decoded token reads
    python: str = sys.executable
    options: dict[str, Any] = field(default_factory=dict)
    same_file: bool = False  # as ours: the answers can be compared

    @property
    def name(self) -> str:
        return f"{self.party} {self.kernel}"


@dataclass(frozen=True)
class Model:
    """What takes part; the first contender is tmac_py."""

    contenders: list[Contender]
    vocab_size: int
    products: int
    peers: dict[str, Any]  # facts by name
    notes: list[str]


class Peer:
    """The environment of a peer."""

    def __init__(self, name: str, python: str) -> None:
        self.name, self.python = name, python
        self._worker = WorkerProcess("peer_worker.py", python=python)
        self.facts = self._worker.facts

    @property
    def package(self) -> str:
        package: str = self.facts["package"]
        return package

    def contenders(
        self, type_name: str, path: Path, nbytes: int, *, same_file: bool = False
    ) -> list[Contender]:
        """ik_llama.cpp with and without run-time repack; llama.cpp repacks by itself."""
        kinds: list[tuple[str, dict[str, Any]]] = [(type_name, {})]
        if self.package == "ik_llama_cpp":
            kinds = [
                (type_name, {"repacked": False}),
                (f"{type_name} repacked", {"repacked": True}),
            ]
        return [
            Contender(
                self.name,
                kernel,
                self.package,
                path,
                nbytes,
                python=self.python,
                options=options,
                same_file=same_file,
            )
            for kernel, options in kinds
        ]

    def write(self, path: Path, shape: str, type_name: str) -> int:
        """A GGUF file of random weights; returns the bytes of a token, OptionError if it cannot."""
        rows_path = path.with_suffix(".npy")

        def quantize(*, type_name: str, k: int) -> NDArray[np.uint8]:
            answer = self._worker.ask("quantize", type_name=type_name, k=k, path=str(rows_path))
            if "missing" in answer:
                raise OptionError(f"{self.name} {type_name}: {answer['missing']}")
            rows: NDArray[np.uint8] = np.load(rows_path)
            return rows

        config, _ = parse_synthetic(shape)
        return write_gguf(path, config, type_name, package=self.package, quantize=quantize)

    def close(self) -> None:
        self._worker.close()


def peer(text: str) -> Peer:
    """A peer of an argument NAME=PYTHON."""
    name, equals, python = text.partition("=")
    if not name or not equals or not python:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON")
    try:
        return Peer(name, python)
    except (WorkerDied, OSError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from None


def default_model(peers: list[Peer], cache_dir: Path | None, tables: str | None) -> Model:
    """The default model in both forms, downloaded and converted if they are not in the cache."""
    with PhaseProgress() as progress:
        lut = ensure_model(MODEL, cache_dir=cache_dir, progress=progress)
        gguf = cached_path(MODEL, cache_dir).with_name(Path(DEFAULT_MODELS[MODEL].member).name)
        if not gguf.is_file():
            fetch_gguf(MODEL, gguf, progress=progress)
    contenders = [
        contender
        for each in peers
        for contender in each.contenders(
            gguf.stem.rpartition(".")[2], gguf, _gguf_bytes(gguf), same_file=True
        )
    ]
    return _model(lut, contenders, peers, tables, [])


def shape_model(
    shape: str, peers: list[Peer], folder: Path, tables: str | None, types: list[str] | None
) -> Model:
    """A shape with random weights in our encoding and in the peers' types of its bits.

    Raises OptionError for an unknown shape, and for a type that none of the peers has.
    """
    _, weights = parse_synthetic(shape)
    for type_name in types or ():
        if peers and not any(type_name in TYPE_IDS[each.package] for each in peers):
            known = sorted({name for each in peers for name in TYPE_IDS[each.package]})
            raise OptionError(f"type {type_name!r}; allowed: {', '.join(known)}")
    lut = folder / "model.lut"
    write_synthetic(lut, shape)
    contenders: list[Contender] = []
    notes: list[str] = []
    for each in peers:
        for type_name in types or TYPES_OF_ENCODING[weights.removesuffix("bit")]:
            if type_name not in TYPE_IDS[each.package]:
                continue
            path = folder / f"{each.package}-{type_name}.gguf"
            try:
                contenders += each.contenders(type_name, path, each.write(path, shape, type_name))
            except OptionError as error:
                notes.append(str(error))
    return _model(lut, contenders, peers, tables, notes)


def _model(
    lut: Path,
    contenders: list[Contender],
    peers: list[Peer],
    tables: str | None,
    notes: list[str],
) -> Model:
    for each in peers:
        each.close()
    with LutFile.open(lut) as file:
        own = Contender(
            OURS,
            tables or file.config.default_tables,
            OURS,
            lut,
            weight_bytes(file),
            options={"tables": tables},
        )
        return Model(
            [own, *contenders],
            file.config.vocab_size,
            layer_products(file),
            {each.name: each.facts for each in peers},
            notes,
        )


def _gguf_bytes(path: Path) -> int:
    sizes = {str(t.name): int(t.n_bytes) for t in GGUFReader(path).tensors if len(t.shape) == 2}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())
