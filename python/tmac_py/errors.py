"""The exceptions this package raises on purpose.

The command line turns each into one line and exit status 2.
"""


class TmacError(Exception):
    """Base class: what went wrong, where, and what is allowed, in one line."""


class OptionError(TmacError, ValueError):
    """An argument or option is outside of what is allowed."""


class ModelFileError(TmacError):
    """A model file is missing, truncated, altered, or of a version this package does not read."""


class UnsupportedError(TmacError):
    """A sound checkpoint uses an architecture, tensor type or option that is not supported."""


class ContextError(TmacError):
    """A prompt or a generation does not fit into the context."""


class DownloadError(TmacError):
    """A model could not be fetched, or what arrived is not what was pinned."""
