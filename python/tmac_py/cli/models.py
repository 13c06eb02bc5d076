"""What a user calls a model, to the file that is meant."""

from __future__ import annotations

from pathlib import Path

from tmac_py.errors import TmacError

DEFAULT_MODEL = "smollm2-135m"


def resolve_model(name: str, *, cache_dir: str | None, offline: bool, quiet: bool) -> Path:
    """The .lut file that ``name`` means: a path, or a model that is fetched into the cache.

    Raises:
        TmacError: there is no such file, or it is a checkpoint that must be converted first.
    """
    from tmac_py.default_model import DEFAULT_MODELS, ensure_model

    if name in DEFAULT_MODELS:
        if quiet:
            return ensure_model(name, cache_dir=cache_dir, offline=offline)
        from tmac_py.cli.progress import PhaseProgress

        with PhaseProgress() as progress:
            return ensure_model(name, cache_dir=cache_dir, offline=offline, progress=progress)
    path = Path(name)
    if path.is_dir() or path.suffix.lower() in (".gguf", ".safetensors"):
        kind = "a folder" if path.is_dir() else f"a {path.suffix.lower()[1:]} file"
        if path.exists():
            raise TmacError(
                f"{path}: {kind}, not a .lut file; "
                f"convert it first: tmac-convert {path} {path.stem or 'model'}.lut"
            )
    if not path.exists():
        raise TmacError(f"{path}: no such file; models with a name: {', '.join(DEFAULT_MODELS)}")
    return path
