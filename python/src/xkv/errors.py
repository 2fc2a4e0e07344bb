"""Exceptions: one class for each status of the C library, and a base for each class of them.

Every one carries `status` (the number, fixed for ever) and `detail` (the library's text: file, offset, field, expected,
found, and the rule of the specification in brackets)."""
from __future__ import annotations

import errno
import os
from typing import Dict, Type

__all__ = [
    "ArgumentError", "BackendError", "CallError", "CancelledError", "ChecksumError", "CorruptError", "DataError",
    "ExistsError", "FeatureError", "FileError", "FitError", "FormatError", "InternalError", "LimitError",
    "MismatchError", "MissingFileError", "NoSpaceError", "NotFoundError", "OutOfMemoryError", "PermissionDeniedError",
    "TargetError", "TimedOutError", "TruncatedError", "UnsupportedError", "VersionError", "XkvError",
]


class XkvError(Exception):
    """Any failure that the C library reports."""

    status: int = 0
    detail: str = ""


class CallError(XkvError):
    """1..19: the call is wrong."""


class ArgumentError(CallError, ValueError):
    """An argument is outside its documented range."""

    status = 1


class UnsupportedError(CallError):
    """Valid, but this build or version cannot do it."""

    status = 2


class DataError(XkvError, ValueError):
    """20..39: the input bytes are not what they should be."""


class FormatError(DataError):
    """Not a file of the expected kind."""

    status = 20


class VersionError(DataError):
    """Needs a newer reader."""

    status = 22


class FeatureError(DataError):
    """Uses a required feature that this reader does not know."""

    status = 24


class CorruptError(DataError):
    """Breaks a numbered rule of the specification."""

    status = 26


class ChecksumError(DataError):
    """A checksum does not match."""

    status = 28


class TruncatedError(DataError):
    """Ends before it should."""

    status = 30


class FitError(XkvError):
    """40..49: the input is sound but does not fit the request."""


class MismatchError(FitError, ValueError):
    """Another model, geometry, engine or dictionary than the caller says."""

    status = 40


class TargetError(FitError, ValueError):
    """The ratio, error or energy that was asked for cannot be reached."""

    status = 42


class NotFoundError(FitError, LookupError):
    """There is no such entry."""

    status = 44


class LimitError(XkvError):
    """Beyond a limit of the format or of the caller (memory limit, byte cap)."""

    status = 50


class OutOfMemoryError(XkvError, MemoryError):
    """The allocator returned nothing."""

    status = 60


class FileError(XkvError, OSError):
    """A system call on a file failed."""

    status = 70


class MissingFileError(FileError, FileNotFoundError):
    """The same: there is no such file."""


class PermissionDeniedError(FileError, PermissionError):
    """The same: it may not be used."""


class ExistsError(FileError, FileExistsError):
    """The output exists and overwriting was not asked for."""

    status = 72


class NoSpaceError(FileError):
    """Disk full, quota or file-size limit reached."""

    status = 74


class CancelledError(XkvError):
    """A signal or a callback asked the call to stop."""

    status = 80


class TimedOutError(XkvError, TimeoutError):
    """Not done in the time that was given."""

    status = 82


class BackendError(XkvError, RuntimeError):
    """The compute backend failed."""

    status = 90


class InternalError(XkvError, RuntimeError):
    """A bug in xkv."""

    status = 100


_BY_STATUS: Dict[int, Type[XkvError]] = {
    c.status: c for c in (ArgumentError, UnsupportedError, FormatError, VersionError, FeatureError, CorruptError,
                          ChecksumError, TruncatedError, MismatchError, TargetError, NotFoundError, LimitError,
                          OutOfMemoryError, FileError, ExistsError, NoSpaceError, CancelledError, TimedOutError,
                          BackendError, InternalError)}
# The detail of a failed system call ends with the system's own text for it.
_BY_ERRNO: Dict[int, Type[FileError]] = {errno.ENOENT: MissingFileError, errno.EACCES: PermissionDeniedError,
                                         errno.EPERM: PermissionDeniedError}


def error_of(status: int, text: str, detail: str) -> XkvError:
    """The exception for a status; `text` is its fixed short description."""
    kind = _BY_STATUS.get(status, XkvError)
    if kind is FileError:
        for number, special in _BY_ERRNO.items():
            if detail.endswith(os.strerror(number)):
                kind = special
    error = kind(f"{text}: {detail}" if detail else text)
    error.status, error.detail = status, detail
    return error
