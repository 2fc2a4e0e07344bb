"""Calls of the C library: contexts, errors, cancelling, callbacks.

cffi releases the GIL during every call. A context runs one call at a time, so each thread takes one of its own for a
call, and another when a callback calls again. Objects of the library that must be freed with the context they were made
with have a context of their own (`Handle`)."""
from __future__ import annotations

import logging
import threading
from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar, cast

from ._native import ffi, lib
from .errors import error_of

logger = logging.getLogger("xkv")
_LEVELS: Dict[int, int] = {1: logging.ERROR, 2: logging.WARNING, 3: logging.INFO, 4: logging.DEBUG}

Progress = Callable[[int, int], object]
F = TypeVar("F", bound=Callable[..., Any])


def called_from_c(**options: Any) -> Callable[[F], F]:
    """Makes the function the one of its name that C calls."""
    return cast(Callable[[F], F], ffi.def_extern(**options))


@called_from_c()
def xkv_py_log(_user: Any, level: int, message: Any) -> None:
    logger.log(_LEVELS.get(level, logging.INFO), "%s", text(message))


def text(chars: Any) -> str:
    """A Python string of a char pointer or array."""
    return ffi.string(chars).decode("utf-8", "replace") if chars else ""


# --- Contexts ---

class Context:
    """Owns an xkv_ctx."""

    def __init__(self, threads: int = 0, memory_limit: int = 0) -> None:
        options = context_options(threads, memory_limit)
        made = ffi.new("xkv_ctx **")
        status = lib.xkv_ctx_create(options, made)
        if status != lib.XKV_OK:
            raise error_of(status, text(lib.xkv_status_string(status)), f"threads {threads}")
        self.pointer = ffi.gc(made[0], lib.xkv_ctx_free)

    def check(self, status: int) -> None:
        """Raise what a status of a call with this context means."""
        if status != lib.XKV_OK:
            detail = text(lib.xkv_ctx_error(self.pointer))
            raise error_of(status, text(lib.xkv_status_string(status)), detail)


def context_options(threads: int, memory_limit: int) -> Any:
    options = ffi.new("xkv_ctx_options *", lib.xkv_ctx_options_default())
    options.threads, options.memory_limit, options.log = threads, memory_limit, lib.xkv_py_log
    return options


class _Settings:
    """How contexts are made from now on; contexts of an older generation are not used again."""

    threads = 0
    memory_limit = 0
    generation = 0


class _ThreadContexts(threading.local):
    def __init__(self) -> None:
        self.generation = _Settings.generation
        self.free: List[Context] = []


_contexts = _ThreadContexts()


def set_threads(threads: int) -> None:
    """Worker threads of one call, the caller's included; 0 (default): as many as there are processors."""
    Context(threads)  # refuses what is out of range
    _Settings.threads = threads
    _Settings.generation += 1


def set_memory_limit(limit: int) -> None:
    """The most bytes that the library allocates in one call and for each opened object; 0 (default): unlimited."""
    _Settings.memory_limit = limit
    _Settings.generation += 1


def new_context() -> Context:
    return Context(_Settings.threads, _Settings.memory_limit)


class borrowed:
    """A context of this thread, for the time of a call: `with borrowed() as context`."""

    def __enter__(self) -> Context:
        if _contexts.generation != _Settings.generation:
            _contexts.generation, _contexts.free = _Settings.generation, []
        self.generation = _contexts.generation
        self.context = _contexts.free.pop() if _contexts.free else new_context()
        return self.context

    def __exit__(self, *_: object) -> None:
        if self.generation == _contexts.generation:
            _contexts.free.append(self.context)


# --- Calls ---

def call(function: Any, *arguments: Any) -> None:
    """function(ctx, *arguments) with a context of this thread."""
    with borrowed() as context:
        call_with(context, function, *arguments)


def call_with(context: Context, function: Any, *arguments: Any) -> None:
    """The same with a given context. Ctrl-C cancels the call within one group of work and is a KeyboardInterrupt."""
    pointer = context.pointer
    lib.xkv_ctx_reset(pointer)
    if threading.current_thread() is threading.main_thread():
        outer = lib.xkv_py_interrupt_begin(pointer)
        try:
            status = function(pointer, *arguments)
        finally:
            lib.xkv_py_interrupt_end(outer)
    else:
        status = function(pointer, *arguments)
    context.check(status)


class Callbacks:
    """Python functions behind the `void *user` of a call. What one raises stops the call and is raised after it:
    `with Callbacks(progress) as callbacks: call(..., callbacks.progress, callbacks.user)`."""

    def __init__(self, progress: Optional[Progress] = None, ready: Optional[Callable[..., object]] = None) -> None:
        self._progress, self._ready = progress, ready
        self._raised: Optional[BaseException] = None
        self.user = ffi.new_handle(self) if progress or ready else ffi.NULL  # a cycle until __exit__()
        self.progress = lib.xkv_py_progress if progress else ffi.NULL
        self.group_ready = lib.xkv_py_group_ready if ready else ffi.NULL
        self.layers_ready = lib.xkv_py_layers_ready if ready else ffi.NULL
        self.store_item = lib.xkv_py_store_item if ready else ffi.NULL

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        self.user = ffi.NULL
        if self._raised is not None:
            raise self._raised from None

    def on_progress(self, done: int, total: int) -> int:
        return self._run(self._progress, done, total)

    def on_ready(self, *arguments: Any) -> int:
        return self._run(self._ready, *arguments)

    def _run(self, function: Optional[Callable[..., object]], *arguments: Any) -> int:
        try:
            assert function is not None
            function(*arguments)
        except BaseException as error:  # also KeyboardInterrupt: it must not be lost in C
            self._raised = error
            return 1
        return 0


def _stop(_kind: object, value: BaseException, trace: Any) -> int:
    """An exception outside _run(): a KeyboardInterrupt between two lines."""
    ffi.from_handle(trace.tb_frame.f_locals["user"])._raised = value
    return 1


@called_from_c(onerror=_stop, error=1)
def xkv_py_progress(user: Any, done: int, total: int) -> int:
    return int(ffi.from_handle(user).on_progress(done, total))


@called_from_c(onerror=_stop, error=1)
def xkv_py_group_ready(user: Any, group: int) -> int:
    return int(ffi.from_handle(user).on_ready(group))


@called_from_c(onerror=_stop, error=1)
def xkv_py_layers_ready(user: Any, group: int, layers: int) -> int:
    return int(ffi.from_handle(user).on_ready(group, layers))


@called_from_c(onerror=_stop, error=1)
def xkv_py_store_item(user: Any, item: Any) -> int:
    return int(ffi.from_handle(user).on_ready(item))


# --- Objects of the library ---

class Handle:
    """An object of the library with the context that made and frees it, and what must live as long.

    `free(ctx, pointer)` runs once: by close(), or when the last reference goes."""

    def __init__(self, kind: str, make: Any, arguments: Tuple[Any, ...], free: Any, keep: Tuple[object, ...] = ()) -> None:
        self.context = new_context()
        self.keep = keep
        self._free = free
        self._pointer: Any = None
        self._lock = threading.Lock()
        made = ffi.new(f"{kind} **")
        call_with(self.context, make, *arguments, made)
        self._pointer = made[0] if made[0] != ffi.NULL else None

    @property
    def pointer(self) -> Any:
        if self._pointer is None:
            raise ValueError("it is closed")
        return self._pointer

    @property
    def closed(self) -> bool:
        return self._pointer is None

    def close(self) -> None:
        with self._lock:
            pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self._free(self.context.pointer, pointer)
            self.keep = ()

    def __del__(self) -> None:
        if getattr(self, "_pointer", None) is not None:
            self.close()


class Owner:
    """Base of the classes that hold a Handle: `with`, close(), closed."""

    _handle: Handle

    def close(self) -> None:
        """Free it now; otherwise that happens when the last reference goes. Not while a call uses it."""
        self._handle.close()

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def __exit__(self, *_: object) -> None:
        self.close()
