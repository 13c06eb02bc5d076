"""Checkpoints on the Hugging Face hub: the files a conversion needs, through the hub's own cache.

huggingface_hub keeps the cache, reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE, and goes
on with downloads that broke off.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from tmac_py.converters.checkpoint import PICKLES, listed
from tmac_py.converters.json_file import read_object
from tmac_py.errors import ModelFileError, UnsupportedError

SCHEME = "hf://"

_ID = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<choice>[^:]+))?"
)
_FILES = (".gguf", ".safetensors", *PICKLES)

_INDEX = "model.safetensors.index.json"
_SMALL = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    _INDEX,
)
"""What readers of Hugging Face folders look at beside the weights."""


@dataclass(frozen=True)
class HubId:
    """A repository at a revision (None: its main branch) and, of several GGUF files, which one."""

    name: str
    revision: str | None = None
    choice: str | None = None

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")


def parse_id(source: str) -> HubId | None:
    """``org/name``, ``org/name@revision``, ``org/name:CHOICE``, all with or without ``hf://``.

    None for anything else, names of files of weights among it. Raises ModelFileError for what
    begins with ``hf://`` and does not go on like this.
    """
    match = _ID.fullmatch(source.removeprefix(SCHEME))
    if source.startswith(SCHEME):
        if match is None:
            raise ModelFileError(
                f"{source}: must be hf://ORG/NAME, then @REVISION or :FILE if need be"
            )
    elif match is None or (match["choice"] is None and source.endswith(_FILES)):
        return None
    return HubId(match["name"], match["revision"], match["choice"])


def fetch(hub_id: HubId, *, quiet: bool = True) -> tuple[Path, str]:
    """The folder or GGUF file in the cache, complete, and ``org/name@commit`` (``:FILE`` of GGUF).

    ``quiet``: no bars. Otherwise as :func:`locate`.
    """
    return locate(hub_id).fetch(quiet=quiet)


def locate(hub_id: HubId, *, offline: bool = False) -> Located:
    """What ``hub_id`` means today, found without fetching weights.

    Without a connection, or with ``offline`` or HF_HUB_OFFLINE=1, what the cache has.

    Raises ModelFileError for a repository that cannot be had, and for a choice of GGUF files that
    is not one; UnsupportedError for a repository without safetensors or GGUF files, and
    where huggingface_hub is not installed.
    """
    if find_spec("huggingface_hub") is None:
        raise UnsupportedError(
            f"{hub_id}: no such file or folder; names on the hub need: pip install 'tmac_py[hub]'"
        )
    with _bars(quiet=True):
        snapshot = _Snapshot.find(hub_id, offline=offline)
    ggufs = [name for name in snapshot.names if name.endswith(".gguf")]
    folder = "config.json" in snapshot.names and any(
        name.endswith(".safetensors") for name in snapshot.names
    )
    if hub_id.choice is not None or (ggufs and not folder):
        return Located(hub_id, snapshot, _choose(hub_id, ggufs))
    if not folder:
        raise _nothing_to_read(hub_id, snapshot.names)
    return Located(hub_id, snapshot, None)


class Located:
    """A folder (``gguf`` None) or a GGUF file at one commit of a repository."""

    def __init__(self, hub_id: HubId, snapshot: _Snapshot, gguf: str | None) -> None:
        self._id, self._snapshot, self._gguf = hub_id, snapshot, gguf

    @property
    def name(self) -> str:
        """``org/name@commit``, and ``:FILE`` of GGUF files."""
        file = "" if self._gguf is None else f":{self._gguf}"
        return f"{self._id.name}@{self._snapshot.commit}{file}"

    def fetch(self, *, quiet: bool = True) -> tuple[Path, str]:
        """The folder or file in the cache, complete, and its name. ``quiet``: no bars."""
        snapshot = self._snapshot
        with _bars(quiet=quiet):
            if self._gguf is not None:
                path = snapshot.fetch([self._gguf]) / self._gguf
            else:
                path = snapshot.fetch([name for name in _SMALL if name in snapshot.names])
                snapshot.fetch(_weights(path, snapshot.names))
        return path, self.name


class _Snapshot:
    """One commit of a repository: the names of its files, or of those that the cache has."""

    def __init__(self, hub_id: HubId, commit: str, names: Sequence[str], *, cached: bool) -> None:
        self.commit = commit
        self.names = names
        self._id = hub_id
        self._revision = hub_id.revision
        self._cached = cached

    @classmethod
    def find(cls, hub_id: HubId, *, offline: bool) -> _Snapshot:
        from huggingface_hub import HfApi, snapshot_download

        try:
            if offline:
                raise ConnectionError("downloads are switched off")
            info = HfApi().model_info(hub_id.name, revision=hub_id.revision)
        except Exception as error:  # those of whatever HTTP library the client uses, too
            try:
                folder = Path(
                    snapshot_download(
                        hub_id.name,
                        revision=hub_id.revision,
                        allow_patterns=["config.json"],
                        local_files_only=True,
                    )
                )
            except (OSError, ValueError):
                raise _not_fetched(hub_id, error) from error
            names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
            return cls(hub_id, folder.name, sorted(names), cached=True)
        names = sorted(entry.rfilename for entry in info.siblings or ())
        return cls(hub_id, str(info.sha), names, cached=False)

    def fetch(self, names: Sequence[str]) -> Path:
        """The folder of the snapshot, with these files."""
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    self._id.name,
                    revision=self._revision,
                    allow_patterns=[glob.escape(name) for name in names],
                    local_files_only=self._cached,
                )
            )
        except Exception as error:
            raise _not_fetched(self._id, error) from error
        if lost := [name for name in names if not (folder / name).is_file()]:
            raise ModelFileError(f"{self._id}: not in the cache: {listed(lost)}")
        self.commit = self._revision = folder.name  # later files are of the same commit
        return folder


def _weights(folder: Path, names: Sequence[str]) -> list[str]:
    """The safetensors files that a reader of the folder opens."""
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if _INDEX in names:
        shards = read_object(folder / _INDEX).get("weight_map")
        if isinstance(shards, dict):
            wanted = {shard for shard in shards.values() if isinstance(shard, str)}
            return [name for name in names if name in wanted]
    return [name for name in names if name.endswith(".safetensors") and "/" not in name]


def _choose(hub_id: HubId, ggufs: list[str]) -> str:
    """The GGUF file of that name, or the only one whose name has the choice as a word."""
    if hub_id.choice is None:
        found = ggufs
    elif hub_id.choice in ggufs:
        found = [hub_id.choice]
    else:
        word = re.compile(rf"(?i)(^|[-._/]){re.escape(hub_id.choice)}([-./]|$)")
        found = [name for name in ggufs if word.search(str(PurePosixPath(name).with_suffix("")))]
    if len(found) == 1:
        return found[0]
    if not ggufs:
        raise ModelFileError(f"{hub_id}: has no GGUF file to choose {hub_id.choice!r} from")
    asked = "" if hub_id.choice is None else f" {hub_id.choice!r} is {len(found)} of them:"
    raise ModelFileError(
        f"{hub_id}: has {len(ggufs)} GGUF files, choose one as in {hub_id}:Q4_K_M;{asked} "
        f"{listed(found or ggufs)}"
    )


def _nothing_to_read(hub_id: HubId, names: Sequence[str]) -> UnsupportedError:
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return UnsupportedError(
            f"{hub_id}: {pickles[0]} is a pickle, which can run code when it is opened; "
            "safetensors or GGUF files are needed"
        )
    return UnsupportedError(f"{hub_id}: has neither config.json and safetensors nor GGUF files")


def _not_fetched(hub_id: HubId, error: Exception) -> ModelFileError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ModelFileError(
        f"{hub_id}: no such file or folder, and not to be had from the Hugging Face hub: {reason}"
    )


@contextmanager
def _bars(*, quiet: bool) -> Iterator[None]:
    """Without the bars of huggingface_hub if ``quiet``."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if not quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
