"""The folder of packed files: where it is, whether it is writable, and which other users may write there."""

import os
import stat
from pathlib import Path

from vllm_adapmoe.config import AdapMoEError


def packs_root(store_dir: str | Path | None) -> Path:
    """Returns the folder for packed files: `store_dir`, or `adapmoe` in vLLM's cache, found as vLLM finds it.

    Raises:
        AdapMoEError: `store_dir` begins with ~, and this user has no home folder.
    """
    if store_dir is None:
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "vllm")
        return Path(os.path.expanduser(os.environ.get("VLLM_CACHE_ROOT", cache))) / "adapmoe"
    try:
        return Path(store_dir).expanduser().absolute()
    except RuntimeError:
        raise AdapMoEError(f"store_dir={str(store_dir)!r}: this user has no home folder; name a full path") from None


def why_not_writable(folder: Path) -> str | None:
    """Creates the folder if missing; returns why no file can be created in it, or None. Writes no file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or type(error).__name__
    if os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return None
    read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    return "Read-only file system" if read_only else "Permission denied"


def others_who_may_write(path: Path) -> str | None:
    """Names a user or group, other than this user and root, that could replace a file's content; None: none could.

    That is, one that owns the file or a folder above it, or may write to one of them.
    """
    for place in (path, *path.absolute().parents):
        try:
            status = place.stat()
        except OSError:
            continue
        if status.st_uid not in (0, os.geteuid()):
            return f"user {status.st_uid} (owner of {str(place)!r})"
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX and place != path.absolute().parent
        if status.st_mode & stat.S_IWOTH and not sticky:
            return f"all users (mode {stat.S_IMODE(status.st_mode):o} of {str(place)!r})"
        if status.st_mode & stat.S_IWGRP and not sticky and status.st_gid != 0:
            return f"group {status.st_gid} (mode {stat.S_IMODE(status.st_mode):o} of {str(place)!r})"
    return None
