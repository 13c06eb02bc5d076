"""The exceptions this package raises on purpose; the command line turns each into one line and exit status 2."""


class TmacError(Exception):
    """Base class: what went wrong, where, and what is allowed, in one line."""


class ModelFileError(TmacError):
    """A model file is missing, truncated, altered, or of a version this package does not read."""


class UnsupportedError(TmacError):
    """A checkpoint is sound but uses an architecture, tensor type or option that is not supported."""


class ContextError(TmacError):
    """A prompt or a generation does not fit into the context."""


class DownloadError(TmacError):
    """A model could not be fetched, or what arrived is not what was pinned."""
