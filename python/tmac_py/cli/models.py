"""What a user calls a model, to the file that is meant."""

from __future__ import annotations

from pathlib import Path

from tmac_py.errors import TmacError

DEFAULT_MODEL = "smollm2-135m"


def model_name(positional: str | None, option: str | None) -> str:
    """The model that an argument or ``-m`` names, else the default; TmacError for two of them."""
    given = {name for name in (positional, option) if name is not None}
    if len(given) > 1:
        raise TmacError(f"two models are given: {positional} and -m {option}")
    return given.pop() if given else DEFAULT_MODEL


def resolve_model(name: str, *, cache_dir: str | None, offline: bool, quiet: bool) -> Path:
    """The .lut file that ``name`` means: a path, or a model that is fetched into the cache.

    Raises:
        TmacError: there is no such file, or the model cannot be fetched.
    """
    from tmac_py.default_model import DEFAULT_MODELS, ensure_model

    if name not in DEFAULT_MODELS:
        return _existing(name)
    if quiet:
        return ensure_model(name, cache_dir=cache_dir, offline=offline)
    from tmac_py.cli.progress import PhaseProgress

    with PhaseProgress() as progress:
        return ensure_model(name, cache_dir=cache_dir, offline=offline, progress=progress)


def find_model(name: str, *, cache_dir: str | None) -> Path:
    """The same, sound or not, without fetching anything.

    Raises:
        TmacError: there is no such file, or the model is not in the cache.
    """
    from tmac_py.default_model import DEFAULT_MODELS, cached_path

    if name not in DEFAULT_MODELS:
        return _existing(name)
    path = cached_path(name, cache_dir)
    if not path.exists():
        raise TmacError(f"{name} is not in {path.parent}; fetch it with: tmac-run {name} -p Hello")
    return path


def _existing(name: str) -> Path:
    from tmac_py.default_model import DEFAULT_MODELS

    path = Path(name)
    if not path.exists():
        raise TmacError(f"{path}: no such file; models with a name: {', '.join(DEFAULT_MODELS)}")
    return path
