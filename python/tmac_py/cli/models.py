"""What a user calls a model, to the file that is meant."""

from __future__ import annotations

import sys
from pathlib import Path

from tmac_py.errors import TmacError

DEFAULT_MODEL = "smollm2-135m"
MODEL_HELP = (
    "a .lut file; a GGUF file, Hugging Face folder or ORG/NAME on the Hugging Face hub "
    "(@REVISION, :Q4_K_M as for tmac convert), which is converted once into the cache folder; or "
    f"the name of a model to fetch (default: {DEFAULT_MODEL})"
)


def model_name(positional: str | None, option: str | None) -> str:
    """The model that an argument or ``-m`` names, else the default; TmacError for two of them."""
    given = {name for name in (positional, option) if name is not None}
    if len(given) > 1:
        raise TmacError(f"two models are given: {positional} and -m {option}")
    return given.pop() if given else DEFAULT_MODEL


def resolve_model(name: str, *, cache_dir: str | None, offline: bool, quiet: bool) -> Path:
    """The .lut file that ``name`` means.

    A path or a model by name, which is fetched and converted into the cache where it is not there.

    Raises:
        TmacError: there is no such model, or it cannot be fetched or converted.
        OSError: the cache folder cannot be written.
    """
    from tmac_py.cli.progress import PhaseProgress
    from tmac_py.conversions import ensure_converted, ensure_from_hub, is_checkpoint
    from tmac_py.default_model import DEFAULT_MODELS, ensure_model

    path = Path(name)
    with PhaseProgress() as bars:
        progress = None if quiet else bars
        if name in DEFAULT_MODELS:
            return ensure_model(name, cache_dir=cache_dir, offline=offline, progress=progress)
        warn = None if quiet else _warn
        if path.exists():
            if not is_checkpoint(path):
                return path
            return ensure_converted(path, cache_dir=cache_dir, progress=progress, warn=warn)
        if path.suffix != ".lut":
            from tmac_py.converters.hub import parse_id

            if (hub_id := parse_id(name)) is not None:
                return ensure_from_hub(
                    hub_id,
                    cache_dir=cache_dir,
                    offline=offline,
                    quiet=quiet,
                    progress=progress,
                    warn=warn,
                )
    return _existing(name)


def needs_check(name: str) -> bool:
    """Whether `resolve_model` has not compared the file of ``name`` with its checksums already."""
    from tmac_py.default_model import DEFAULT_MODELS

    return name not in DEFAULT_MODELS


def find_model(name: str, *, cache_dir: str | None) -> Path:
    """The .lut file that a path or a name means, sound or not, without fetching anything.

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


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
