"""``tmac completion``: scripts that complete commands and options, made from their parsers."""

from __future__ import annotations

import argparse
from importlib.metadata import entry_points

from tmac_py.errors import UnsupportedError

SHELLS = ("bash", "zsh", "fish")

_FILES = ("MODEL", "FILE", "SOURCE", "OUT.lut", "OTHER")
_FOLDERS = ("FOLDER", "DIR")
"""What options call a file and a folder in their help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the argument of ``tmac completion``."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def execute(args: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError:
        raise UnsupportedError(
            "shtab is not installed; completion needs: pip install 'tmac_py[completion]'"
        ) from None

    from tmac_py.cli.main import COMMANDS, main_parser, program_parser

    installed = {point.name for point in entry_points(group="console_scripts")}
    parsers = [main_parser()]
    parsers += [program_parser(c.name) for c in COMMANDS if f"tmac-{c.name}" in installed]
    for parser in parsers:
        _complete_files(parser)
        prefix = parser.prog.replace("-", "__")  # "tmac run" has the names with one
        print(shtab.complete(parser, shell=args.shell, root_prefix=prefix))
    return 0


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Let names of files be completed where one is expected."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command)
        elif action.metavar in (*_FILES, *_FOLDERS):
            only_folders = action.metavar in _FOLDERS
            action.complete = shtab.DIRECTORY if only_folders else shtab.FILE  # type: ignore[attr-defined]
