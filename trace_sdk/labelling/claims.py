"""Who works on what, in a folder that processes of several machines share."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType

from trace_sdk.atomic import cannot_write, make_folder, remove

STALE_SECONDS = 120.0


class Claims:
    """Claims of this process: files made by atomic create, and touched as long as it lives.

    One that has not been touched for `stale_seconds`, by the clock of the file server, or whose process has gone from
    this machine, is taken over. A claim only saves work from being done twice. Results are written whole and are the
    same whoever writes them, so a claim taken over from a process that was merely asleep costs time and no byte.

        with Claims(folder) as claims:
            if claims.take("part-1"):
                ...
                claims.release("part-1")
    """

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self._folder, self._stale_seconds = folder, stale_seconds
        self._mark = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        self._held: set[str] = set()
        self._left = threading.Event()
        self._beat = threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> Claims:
        make_folder(self._folder)
        self._beat.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._left.set()
        self._beat.join()
        for key in list(self._held):
            self.release(key)

    def take(self, key: str) -> bool:
        """Whether `key` is now this process's; False if another holds it, or this one already.

        Raises OutputError if the folder cannot be written to.
        """
        file = self._file(key)
        if key in self._held:
            return False
        if not self._create(file):
            if not self._abandoned(file):
                return False
            remove(file)
            if not self._create(file):
                return False
        self._held.add(key)
        return True

    def release(self, key: str) -> None:
        """Give `key` back, unless another process has taken it over."""
        self._held.discard(key)
        file = self._file(key)
        try:
            if file.read_text("utf-8") == self._mark:
                file.unlink()
        except OSError:
            pass  # it is gone; or it cannot be removed, and is taken over as what a killed process leaves is

    def _create(self, file: Path) -> bool:
        try:
            with file.open("x", encoding="utf-8") as claim:
                claim.write(self._mark)
        except FileExistsError:
            return False
        except OSError as error:
            remove(file)  # an empty one, where the disk is full, would count as held until it is stale
            raise cannot_write(file, error) from error
        return True

    def _abandoned(self, file: Path) -> bool:
        try:
            holder, touched = file.read_text("utf-8"), file.stat().st_mtime
        except FileNotFoundError:
            return True
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder) as now:
                age = os.fstat(now.fileno()).st_mtime - touched
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        return age > self._stale_seconds or self._is_gone(holder)

    def _is_gone(self, holder: str) -> bool:
        """Whether the holder was a process of this machine that has ended."""
        if holder == self._mark:
            return True  # an earlier process with our number, as containers have it
        try:
            about = json.loads(holder)
        except ValueError:
            return False  # just being written
        # On Windows 0 is no question but Ctrl-C, so there a claim lasts until it is stale.
        if about["host"] != socket.gethostname() or sys.platform == "win32":
            return False
        try:
            os.kill(about["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def _touch(self) -> None:
        while not self._left.wait(self._stale_seconds / 4):
            for key in list(self._held):
                try:
                    os.utime(self._file(key))
                except OSError:
                    continue  # taken over, or a beat is left out

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.claim"
