"""How one remote shard is fetched: through fsspec in this process, or as the output of a shell command.

One attempt, in one stream: attempts, locks and the bound of the cache are in sources.py. The libraries' own retries are
turned off where they allow it (gcsfs does not), and an attempt ends when no byte came for `timeout` seconds.
"""

import math
import os
import re
import select
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from ldm.data.shards import BadSample
from ldm.errors import UserError

NOT_FOUND, DENIED = "shard/not found", "shard/access denied"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def scheme_of(path: str) -> str:
    """What stands before the colon; empty for a local path."""
    match = _SCHEME.match(path)
    return match[1] if match else ""


def shown(path: str) -> str:
    """For messages: without a user, password or query, and of a command nothing."""
    scheme = scheme_of(path)
    if scheme == "pipe":
        return "pipe:..."
    return re.sub(r"//[^/@]*@", "//", path.partition("?")[0]) if scheme else path


class Meter(fsspec.Callback):
    """Learns the announced size from a transfer, and ends one that is too large."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.limit = math.inf if limit is None else limit

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        """fsspec calls it when `size` is known and after each chunk; `value` counts the bytes so far."""
        if max(self.size or 0, self.value) > self.limit:
            raise BadSample("shard/sidecar too large")


def final_reason(error: Exception) -> str | None:
    """The reason of a failure that another attempt would meet again; None for one that may pass."""
    status = getattr(error, "status", None) or getattr(error, "code", None)  # of aiohttp, of gcsfs
    if isinstance(error, FileNotFoundError) or status == 410:
        return NOT_FOUND
    if isinstance(error, PermissionError) or status in (401, 403):
        return DENIED
    if str(error).startswith("Forbidden: "):  # a plain OSError is how gcsfs says 403
        return DENIED
    return None


def _s3(timeout: float) -> fsspec.AbstractFileSystem:
    limits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
    system = fsspec.filesystem("s3", skip_instance_cache=True, max_concurrency=1, config_kwargs=limits)
    system.retries = 1  # the attempts are counted in one place, which sees every failure
    return system


def _gs(timeout: float) -> fsspec.AbstractFileSystem:
    return fsspec.filesystem(
        "gs", skip_instance_cache=True, requests_timeout=_stall(timeout), session_kwargs={"trust_env": True}
    )


def _http(timeout: float) -> fsspec.AbstractFileSystem:
    return fsspec.filesystem(
        "http",
        skip_instance_cache=True,
        client_kwargs={"timeout": _stall(timeout), "trust_env": True},  # the environment's proxies, as s3fs does
        headers={"Accept-Encoding": "identity"},  # the announced size is of the file, not of a compressed answer
    )


def _stall(timeout: float) -> Any:
    """aiohttp ends every transfer after five minutes unless told otherwise."""
    from aiohttp import ClientTimeout

    return ClientTimeout(total=None, connect=timeout, sock_connect=timeout, sock_read=timeout)


class Store(NamedTuple):
    """A kind of remote place that fsspec reads."""

    connect: Callable[[float], fsspec.AbstractFileSystem]  # from the time-out
    extra: str  # of this package, which brings what it needs
    one_stream: dict[str, int]  # options of get_file: in order, so that memory is bounded and a cut file is a short one

    def fetch(self, path: str, partial: Path, timeout: float, meter: Meter) -> None:
        """Write what lies at `path` into `partial`."""
        system = _connected(scheme_of(path), timeout, os.getpid())
        system.get_file(path, str(partial), callback=meter, **self.one_stream)


STORES = {
    "s3": Store(_s3, "s3", {"max_concurrency": 1}),
    "gs": Store(_gs, "gcs", {"concurrency": 1}),
    "http": Store(_http, "http", {}),
    "https": Store(_http, "http", {}),
}


@cache  # for good: closing an inherited one would take sockets from the parent's event loop, which shares its epoll
def _connected(scheme: str, timeout: float, pid: int) -> fsspec.AbstractFileSystem:
    """The file system of this process; another process's lives in a thread that a fork does not copy."""
    store = STORES[scheme]
    try:
        return store.connect(timeout)
    except ImportError:
        raise UserError(f"{scheme}:// needs a package that is missing; pip install -e '.[{store.extra}]'") from None


def _run(path: str, partial: Path, timeout: float, meter: Meter) -> None:
    """The output of a shell command -> `partial`. `expand` is what decides whether commands may come here."""
    command = path.removeprefix("pipe:")
    with (
        open(partial, "wb") as file,
        subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        ) as process,
    ):
        assert process.stdout is not None
        output = process.stdout.fileno()
        waiting = select.poll()
        waiting.register(output, select.POLLIN)
        try:
            while waiting.poll(timeout * 1000):
                chunk = os.read(output, 2**20)
                if not chunk:
                    process.wait(timeout)
                    break
                file.write(chunk)
            else:
                raise TimeoutError
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the shell and what it started
            raise
    if process.returncode:
        raise ChildProcessError(f"exit status {process.returncode}")


FETCHERS: dict[str, Callable[[str, Path, float, Meter], None]] = {
    "pipe": _run,
    **{scheme: store.fetch for scheme, store in STORES.items()},
}
