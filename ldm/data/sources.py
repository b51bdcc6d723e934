"""Where shards lie: local paths, lists of them, and remote places, read through a bounded folder of local copies.

A remote shard is a URL (s3://, gs://, http://, https://) or `pipe:COMMAND`, whose output is the shard. It is copied once
to the cache folder, which the workers and ranks of a node share: written aside, compared with the size that the server
announced, flushed, renamed. A shard does not change: a copy is used for as long as it lies there. The least recently used
copies are removed; a file that a reader holds open stays whole for that reader.

Shard names become hashes before they reach the cache folder, and messages show no query, password or command: those may
be credentials.
"""

import fcntl
import hashlib
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC, EROFS
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue
from random import SystemRandom
from threading import Event, Thread
from typing import BinaryIO
from uuid import uuid4

from braceexpand import braceexpand

from ldm.data.remote import DENIED, FETCHERS, NOT_FOUND, STORES, Meter, final_reason, scheme_of, shown
from ldm.data.shards import BadSample
from ldm.errors import UserError

FOLDER = "~/.cache/ldm/shards"
MAX_SHARDS = 1_000_000
MAX_LIST = 2**28  # bytes of one list file
MAX_SIDECAR = 2**26  # bytes
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts, doubled each time
AHEAD = 2  # shards that one process fetches ahead at a time
ABANDONED = 3600.0  # seconds without a byte, after which a partial file is nobody's
RACES = 20  # times in a row that others may remove a copy between its arrival and its opening

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_ENDING = re.compile(r"\.[a-z0-9]{1,8}\Z")
_COPY = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{1,8}")  # the folder may hold other files: never touch those
_PARTIAL = re.compile(_COPY.pattern + r"\.[0-9]+-[0-9a-f]{32}\.partial")

_log = logging.getLogger(__name__)


def expand(spec: str | Sequence[str], how_to_make: str | None = None, allow_pipe: bool = False) -> list[str]:
    """`data/{00000..00012}.tar`, `s3://bucket/{0..9}.tar`, `list.txt`, or several of them -> shards, in the order written.

    Args:
        spec: local paths, URLs and list files, with brace ranges or lists. A list file ends in `.txt` and holds one of the
            other two a line; blank lines and lines that begin with # are skipped; paths are relative to the working
            directory.
        how_to_make: the command that makes these shards, told when a local one is missing.
        allow_pipe: accept `pipe:COMMAND`, which runs in a shell.

    Raises:
        UserError: no shard, more than a million, one twice, a local one missing, broken braces, a list that cannot be read,
            a place of another kind.
    """
    texts = [spec] if isinstance(spec, str) else spec
    paths = list(islice(chain.from_iterable(_names(text) for text in texts), MAX_SHARDS + 1))
    if not paths:
        raise UserError(f"shards={spec!r} names no shard; expected a path such as data/{{00000..00012}}.tar")
    if len(paths) > MAX_SHARDS:
        raise UserError(f"{shown(paths[0])!r} and the others are more than {MAX_SHARDS} shards; use fewer, larger ones")
    for path in paths:  # not before: braces can make a scheme
        _check_scheme(path, allow_pipe)
    path, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise UserError(f"shard {shown(path)!r} is listed twice; list each shard once")
    missing = [path for path in paths if not scheme_of(path) and not os.path.isfile(path)]
    if missing:
        hint = f"make them with: {how_to_make}" if how_to_make else "check the path"
        raise UserError(f"shard {missing[0]!r} is not a file ({len(missing)} of {len(paths)} are missing); {hint}")
    return paths


def _names(text: str, listed_in: str | None = None) -> Iterator[str]:
    for name in _braces(text):
        if not name.endswith(".txt"):
            yield name
        elif listed_in is None:
            yield from chain.from_iterable(_names(line, name) for line in _lines(name))
        else:
            raise UserError(f"list {listed_in!r} names another list, {shown(name)!r}; a list holds shards only")


def _braces(text: str) -> Iterator[str]:
    try:
        # braceexpand builds every range in memory before it yields the first name
        ranges = [abs(int(b) - int(a)) // (int(step or 1) or 1) + 1 for a, b, step in _RANGE.findall(text)]
        if math.prod(ranges) > MAX_SHARDS:
            raise UserError(f"shards={shown(text)!r} names more than {MAX_SHARDS} shards; use fewer, larger ones")
        yield from braceexpand(text) if text else ()
    except UserError:
        raise
    except ValueError:  # UnbalancedBracesError, or a number of thousands of digits
        raise UserError(
            f"shards={shown(text)!r} has unbalanced braces or an endless number; write a range as {{00000..00012}}"
        ) from None


def _lines(path: str) -> Iterator[str]:
    try:
        if os.stat(path).st_size > MAX_LIST:
            raise UserError(f"list {path!r} holds more than {MAX_LIST} bytes; expected one shard a line")
        with open(path, encoding="utf-8-sig") as file:  # Windows editors put a BOM first
            for line in map(str.strip, file):
                if line and not line.startswith("#"):
                    yield line
    except OSError as error:
        raise UserError(
            f"list {shown(path)!r} cannot be read: {error.strerror}; expected a local text file, one shard a line"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"list {path!r} is not UTF-8 text; expected one shard a line") from None


def _check_scheme(path: str, allow_pipe: bool) -> None:
    scheme = scheme_of(path)
    if scheme == "pipe" and not allow_pipe:
        raise UserError(
            f"shard {shown(path)!r} is a shell command; if you trust it and everyone who can change this list, "
            "set data.allow_pipe=true"
        )
    if scheme and scheme != "pipe" and (scheme not in STORES or not path.startswith(f"{scheme}://")):
        known = ", ".join(f"{name}://" for name in STORES)
        raise UserError(f"shard {shown(path)!r} is neither a local path nor one of {known}; give one of these")


class ShardCache:
    """A folder of local copies of remote shards, bounded in size, shared by the processes of a node.

    Args:
        folder: on a local disk; made when the first copy arrives. Only the cache's own files in it are ever removed.
        max_bytes: of all copies. The ones being fetched come on top, and one that is larger still works.
        retries: further attempts after a failure that may pass, each after about twice the time.
        timeout: seconds without a byte after which an attempt has failed; a slow transfer may take any time. With all
            retries and waits that is 86 s, and 101 s behind an attempt to fetch ahead: a shard that does not answer has to be
            given up and counted before callbacks.watchdog, at 120 s, takes its reader for dead. (gs:// takes longer: gcsfs
            tries six times an attempt.)

    Raises:
        UserError: a number out of range (here); a package that is missing, or a folder that cannot be used (when copying).
    """

    def __init__(
        self, folder: str | Path = FOLDER, max_bytes: int = 2**36, retries: int = 4, timeout: float = 15.0
    ) -> None:
        if max_bytes < 1 or retries < 0 or not timeout > 0:
            raise UserError(
                f"cache of max_bytes={max_bytes}, retries={retries}, timeout={timeout}; "
                "expected 1 or more, 0 or more, more than 0 seconds"
            )
        self.folder = Path(folder).expanduser().absolute()
        self.max_bytes, self.retries, self.timeout = max_bytes, retries, timeout
        self._absent: set[str] = set()  # side files that are not there
        self._ahead: dict[str, list[str]] = {}  # shards to be opened soon -> the copy, once it is there
        self._too_small = False  # for copies that wait

    def local(self, path: str) -> str:
        """Path of a local file that holds the shard: a local path itself, or of a copy made now or before.

        Another process may remove the copy at any time: to read it, use `open`.

        Raises:
            BadSample: "shard/not found", "shard/access denied"; "shard/unreachable" after the last attempt.
        """
        return self._local(path, None)

    def fetch_ahead(self, path: str) -> None:
        """Have a remote shard copied by a thread of this process, to be there when it is opened. That changes nothing else:
        one attempt is made, and what fails is left to `open`, which tries for itself.

        In a cache that cannot hold what waits, copies would be fetched twice: the first one that is removed before it was
        opened ends this for the process.
        """
        if scheme_of(path) and not self._too_small:
            arrived = self._ahead[path] = []
            _background(os.getpid()).put(partial(self._fetch_ahead, path, arrived))

    def open(self, path: str) -> BinaryIO:
        """The shard opened for reading; it stays whole until closed.

        Raises:
            BadSample: see `local`.
            OSError: a local path that cannot be opened.
        """
        self._ahead.pop(path, None)
        return self._open(path, None)

    def sidecar(self, path: str, ending: str) -> bytes | None:
        """The file beside a shard: 00012.tar -> the bytes of 00012{ending}; None where there is none.

        Raises:
            BadSample: "shard/sidecar too large" (MAX_SIDECAR bytes), "shard/sidecar unreadable", "shard/unreachable".
        """
        self._ahead.pop(path, None)  # whoever asks is about to open the shard, or gives it up for this
        if scheme_of(path) == "pipe":
            return None
        head, mark, query = path.partition("?") if scheme_of(path) else (path, "", "")
        beside = os.path.splitext(head)[0] + ending + mark + query
        if beside in self._absent:
            return None
        try:
            with self._open(beside, MAX_SIDECAR) as file:
                data = file.read(MAX_SIDECAR + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadSample("shard/sidecar unreadable") from error
        except BadSample as bad:
            # S3 denies what is not there to those who may not list the bucket
            if bad.reason not in (NOT_FOUND, DENIED):
                raise
            self._absent.add(beside)
            return None
        if len(data) > MAX_SIDECAR:
            raise BadSample("shard/sidecar too large")
        return data

    def _fetch_ahead(self, path: str, arrived: list[str]) -> None:
        if not self._too_small and any(copy and not os.path.exists(copy[0]) for copy in list(self._ahead.values())):
            self._too_small = True
            _log.warning("%s: too small to fetch shards ahead; raise data.cache.max_bytes", self.folder)
        if not self._too_small and self._ahead.get(path) is arrived:  # else it was opened meanwhile
            with suppress(Exception):  # whatever it is, `open` meets it
                arrived.append(self._local(path, None, ahead=True))

    def _open(self, path: str, limit: int | None) -> BinaryIO:
        for _ in range(RACES):
            try:
                return open(self._local(path, limit), "rb")
            except FileNotFoundError:  # another process has removed the copy
                if not scheme_of(path):
                    raise
        raise BadSample("shard/unreachable")

    def _local(self, path: str, limit: int | None, ahead: bool = False) -> str:
        if not scheme_of(path):
            return path
        copy = self.folder / _copy_name(path)
        try:
            if not _use(copy):
                self.folder.mkdir(parents=True, exist_ok=True)
                with _locked(copy.with_name(f"{copy.name}.lock")):
                    if not _use(copy):  # another process may have fetched it meanwhile
                        self._fetch(path, copy, limit, ahead)
        except OSError as error:  # what the network raises has become a BadSample
            raise UserError(
                f"cache folder {str(self.folder)!r}: {error.strerror}; use a local disk with room for more than "
                f"{self.max_bytes} bytes"
            ) from error
        return str(copy)

    def _fetch(self, path: str, copy: Path, limit: int | None, ahead: bool) -> None:
        retries = 0 if ahead else self.retries  # who opens it meanwhile waits, and then has all of its own
        for left in self.folder.glob(f"{copy.name}.*.partial"):  # by a process that died: this one holds the lock
            left.unlink(missing_ok=True)
        self._evict(copy)
        for attempt in range(retries + 1):
            if attempt:  # at random, lest all workers come back together; not from the seeded generators
                wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
                Event().wait(wait * SystemRandom().uniform(0.5, 1.5))
            try:
                self._attempt(path, copy, limit)
                break
            except (UserError, BadSample):
                raise
            except Exception as error:  # aiohttp, botocore and gcsfs have no common class
                if getattr(error, "errno", None) in (ENOSPC, EDQUOT, EROFS):
                    raise
                reason, cause = final_reason(error), type(error).__name__
            if reason:  # raised out here: the cause's message may hold the query
                raise BadSample(reason)
            if attempt == retries:
                if not ahead:
                    _log.warning("%s: given up after %d attempts (%s)", shown(path), attempt + 1, cause)
                raise BadSample("shard/unreachable")
        self._evict(copy)

    def _attempt(self, path: str, copy: Path, limit: int | None) -> None:
        partial = copy.with_name(f"{copy.name}.{os.getpid()}-{uuid4().hex}.partial")
        meter = Meter(limit)
        try:
            FETCHERS[scheme_of(path)](path, partial, self.timeout, meter)
            with open(partial, "rb+") as file:
                size = file.seek(0, os.SEEK_END)
                if meter.size is not None and size != meter.size:
                    raise ConnectionError(f"{size} of {meter.size} bytes came")
                os.fsync(file.fileno())
            os.replace(partial, copy)
        finally:
            partial.unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        """Remove the least recently used copies but `keep` until all fit. Others may be doing the same."""
        copies, total = [], 0
        for entry in os.scandir(self.folder):
            partial = _PARTIAL.fullmatch(entry.name)
            if not partial and not _COPY.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):
                stat = entry.stat(follow_symlinks=False)
                if partial and time.time() - stat.st_mtime > ABANDONED + self.timeout:
                    os.unlink(entry.path)
                    continue
                total += stat.st_size
                if not partial and entry.name != keep.name:
                    copies.append((stat.st_mtime_ns, stat.st_size, entry.path))
        for _, size, path in sorted(copies):
            if total <= self.max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


@cache  # by process: a fork does not copy threads
def _background(process: int) -> SimpleQueue[Callable[[], None]]:
    """What is put there, this process's threads run. They are daemons: its end does not wait for them."""
    jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
    for _ in range(AHEAD):
        Thread(target=_run_all, args=(jobs,), daemon=True, name="fetch ahead").start()
    return jobs


def _run_all(jobs: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()


def _copy_name(path: str) -> str:
    ending = _ENDING.search(path.partition("?")[0].lower())
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest() + (ending[0] if ending else ".bin")


def _use(copy: Path) -> bool:
    """Is it there? Then it is now the most recently used."""
    try:
        os.utime(copy)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The kernel frees the lock of a process that dies, and the file goes with its last use."""
    while True:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if _is_still(file, path):  # else its former holder has removed it: others lock another file
                    try:
                        yield
                    finally:
                        path.unlink(missing_ok=True)
                    return
            finally:  # said aloud: a process forked meanwhile holds the file open
                fcntl.flock(file, fcntl.LOCK_UN)


def _is_still(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
