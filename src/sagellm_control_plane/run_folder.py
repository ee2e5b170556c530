"""Where the sockets and logs of child engines lie: beside the state file, or where their paths are short enough."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sagellm_protocol import InvalidArgumentError, UnavailableError

# The path of a Unix socket has no room for more than a hundred bytes, and its name takes nearly forty.
LONGEST_FOLDER = 60


def run_folder(state: Path) -> Path:
    """The folder for the children of the manager with that state file: the same for the next one, as long as it exists.

    It is `<state>.run`. Where that path is too long for sockets, that is a link to a short folder of mode 0700.
    Raises `InvalidArgumentError` where something else has the link's name, `UnavailableError` where it can't be made.
    """
    folder = Path(f"{state.expanduser().absolute()}.run")
    if len(os.fsencode(folder)) <= LONGEST_FOLDER:
        return folder
    try:
        if not folder.is_symlink():
            _link(folder)
        elif not _is_ours(folder):  # what it shows has gone, as after a restart of the machine
            folder.unlink()
            _link(folder)
        return Path(os.readlink(folder))
    except OSError as error:
        raise UnavailableError(f"{folder} cannot be made ({error.strerror}); name another state file") from error


def short_folder() -> Path:
    """A new folder of this user alone, with room for the paths of sockets, in the first place that has it."""
    for parent in _parents():
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="sagellm-", dir=parent))
            if len(os.fsencode(folder)) <= LONGEST_FOLDER:
                return folder
            folder.rmdir()
    raise UnavailableError("no folder for sockets can be made in TMPDIR, /tmp or XDG_RUNTIME_DIR; set TMPDIR to one")


def _parents() -> Iterator[str]:
    # The runtime folder comes last: it goes with the user's session, which children may outlive.
    yield tempfile.gettempdir()
    yield "/tmp"
    if "XDG_RUNTIME_DIR" in os.environ:
        yield os.environ["XDG_RUNTIME_DIR"]


def _link(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.is_dir():
        with suppress(OSError):  # one that holds nothing is in nobody's way
            folder.rmdir()
    if folder.exists():
        raise InvalidArgumentError(f"{folder} is in the way of a link; remove it", field="state")
    target = short_folder()
    try:
        folder.symlink_to(target)
    except BaseException:
        target.rmdir()
        raise


def _is_ours(folder: Path) -> bool:
    try:
        status = folder.stat()
    except FileNotFoundError:
        return False
    return folder.is_dir() and status.st_uid == os.getuid() and not status.st_mode & 0o077
