"""
Checkpoints as files that a crash cannot spoil, and that say so when something else has.

A checkpoint is a folder ``checkpoint_<number>_<time steps>_steps``. It is written under another name and renamed once all of
it has reached the disk, so whoever sees it sees it whole. Its ``manifest.json`` holds size and SHA-256 of every file and of
itself.

Rows of the replay buffer, by far the largest part, lie in the folder ``replay_rows`` beside the checkpoints: each checkpoint
adds one segment with the rows that came since the last one, and refers to the earlier segments that hold rows which it needs.
Where these hold too many rows that were overwritten since, it writes all rows into one segment of its own.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sb3_mtrl.common.buffers import ROWS_PER_BLOCK, MultiTaskReplayBuffer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Counted up when a checkpoint of before can no longer be read
FORMAT = 1
MANIFEST = "manifest.json"
ROWS = "replay_rows"
# All rows are written anew when a checkpoint would need more segments than this, or more bytes per byte that is held: rows of
# a task that comes seldom stay for long, and would keep on the disk what came with them
MAX_SEGMENTS = 64
MAX_BYTES_PER_HELD = 1.5
CHUNK = 1 << 22  # bytes that are read at a time
_NAME = re.compile(r"checkpoint_(\d+)_(\d+)_steps")
_SEGMENT_NAME = re.compile(r"segment_\d{6,}\.f32")
# What a crash may leave behind: a checkpoint that is being written, and one that is being removed
_UNFINISHED, _REMOVED = ".writing_", ".removed_"
_LEFTOVER = re.compile(rf"{re.escape(_UNFINISHED)}(\d+|probe)|{re.escape(_REMOVED)}{_NAME.pattern}")
_LOCK = ".lock"


class BrokenCheckpointError(ValueError):
    """A checkpoint that is not whole, or of another format; the message names file and reason."""


class FileEntry(NamedTuple):
    """What the manifest says of a file."""

    n_bytes: int
    sha256: str


class Segment(NamedTuple):
    """
    A file with rows of the replay buffer, those of task 0 first.

    ``ranges`` are first and past-the-last number of the rows of each task.
    """

    name: str
    entry: FileEntry
    ranges: list[list[int]]


class Checkpoint(NamedTuple):
    """
    A whole checkpoint.

    :param path: Its folder
    :param timesteps: Time steps of the training so far
    :param description: What its writer said of it, for comparisons before it is read
    :param files: The other files in the folder
    :param segments: Segments with the rows of the replay buffer, oldest first
    """

    path: pathlib.Path
    timesteps: int
    description: dict[str, Any]
    files: dict[str, FileEntry]
    segments: list[Segment]

    def open(self, name: str) -> Any:
        """
        :param name: Name of a file
        :return: The file, to be read in binary mode
        """
        return (self.path / name).open("rb")

    def load_rows(self, buffer: MultiTaskReplayBuffer) -> None:
        """
        Put the rows of the segments in their places.

        :param buffer: A replay buffer of the same shape that knows already which rows it holds
        """
        held, row_bytes = buffer.row_numbers().tolist(), 4 * buffer.row_width
        for segment in self.segments:
            with (self.path.parent / ROWS / segment.name).open("rb") as file:
                n_before = 0
                for task, (start, end) in enumerate(segment.ranges):
                    first, last = max(start, held[task][0]), min(end, held[task][1])
                    if first < last:
                        file.seek((n_before + first - start) * row_bytes)
                        for block_start in range(first, last, ROWS_PER_BLOCK):
                            n_rows = min(ROWS_PER_BLOCK, last - block_start)
                            rows = np.empty((n_rows, buffer.row_width), dtype=np.float32)
                            file.readinto(rows.data.cast("B"))
                            buffer.set_rows(task, block_start, rows)
                    n_before += end - start


class HashingFile:
    """
    A file to write to that takes the checksum of what is written, and is on the disk when it is closed.

    :param path: Its path
    """

    def __init__(self, path: pathlib.Path):
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()
        self._n_bytes = 0

    def write(self, data: Any) -> int:
        """
        :param data: Bytes, or what shows its memory as bytes
        :return: Number of bytes
        """
        self._file.write(data)
        self._sha256.update(data)
        n_bytes = memoryview(data).nbytes
        self._n_bytes += n_bytes
        return n_bytes

    @property
    def entry(self) -> FileEntry:
        """What the manifest says of this file."""
        return FileEntry(self._n_bytes, self._sha256.hexdigest())

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        with self._file:
            if exc_info[0] is None:
                self._file.flush()
                os.fsync(self._file.fileno())


class CheckpointStore:
    """
    Folder of the checkpoints of one training.

    :param folder: The folder; it is made
    :param keep: Number of last checkpoints to keep
    :raises ValueError: if nothing can be written there
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int):
        self.folder = pathlib.Path(folder)
        self.keep = keep
        # Rows on disk: of which buffer (segments of another one are of no use), and where
        self._buffer: MultiTaskReplayBuffer | None = None
        self._segments: list[Segment] = []
        self._lock: Any = None
        try:
            (self.folder / ROWS).mkdir(parents=True, exist_ok=True)
            probe = self.folder / f"{_UNFINISHED}probe"
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        except OSError as error:
            raise ValueError(f"save_path must be a folder that can be written to, got {folder!s}: {error}") from error

    def find(self) -> list[pathlib.Path]:
        """
        :return: Folders of the checkpoints, whole or not, newest last
        """
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def lock(self) -> None:
        """
        Claim the folder for this process, as long as it lives.

        :raises ValueError: if another process has done so
        """
        if fcntl is None:
            return
        file = (self.folder / _LOCK).open("a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise ValueError(f"save_path must be a folder that no other process trains in, got {self.folder!s}") from error
        except OSError:
            pass  # a file system without locks
        self._lock = file

    def clean_up(self) -> None:
        """Remove what a crash has left behind; to be called when it is known which checkpoint to go on from."""
        for path in self.folder.iterdir():
            if _LEFTOVER.fullmatch(path.name) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._remove_unused_segments()

    def go_on_from(self, checkpoint: Checkpoint, buffer: MultiTaskReplayBuffer | None) -> None:
        """
        Take a checkpoint that was read for the last one that was written.

        :param checkpoint: The checkpoint
        :param buffer: The replay buffer that holds its rows now
        """
        if self.holds(checkpoint.path):  # else its rows lie somewhere else: the next checkpoint writes them all
            self._buffer, self._segments = buffer, checkpoint.segments

    def holds(self, path: pathlib.Path) -> bool:
        """
        :param path: Folder of a checkpoint
        :return: Whether it lies in this folder
        """
        return path.parent.resolve() == self.folder.resolve()

    def write(
        self,
        timesteps: int,
        description: dict[str, Any],
        writers: dict[str, Callable[[HashingFile], None]],
        buffer: MultiTaskReplayBuffer | None,
    ) -> pathlib.Path:
        """
        Write a checkpoint, and remove those that are too old. If it fails all is as before.

        :param timesteps: Time steps of the training so far
        :param description: What to say of it in the manifest, as JSON can
        :param writers: Functions that write the other files, by name
        :param buffer: Replay buffer whose rows it holds; None without
        :return: Its folder
        :raises OSError: if it cannot be written
        :raises MemoryError: if there is too little memory to do so
        """
        number = 1 + max(map(_number, self.find()), default=0)
        path = self.folder / f"checkpoint_{number:06d}_{timesteps}_steps"
        unfinished = self.folder / f"{_UNFINISHED}{number}"
        segment_path = self.folder / ROWS / f"segment_{number:06d}.f32"
        try:
            unfinished.mkdir()
            segments = [] if buffer is None else self._write_rows(segment_path, buffer)
            files = {}
            for name, write in writers.items():
                with HashingFile(unfinished / name) as file:
                    write(file)
                files[name] = file.entry
            content = {
                "format": FORMAT,
                "timesteps": timesteps,
                "description": description,
                "files": files,
                "segments": segments,
            }
            with HashingFile(unfinished / MANIFEST) as file:
                file.write(json.dumps({"content": content, "sha256": _digest(content)}).encode())
            _sync_folder(unfinished)
            unfinished.rename(path)
        except BaseException:
            if not path.exists():  # an interrupt may come when the checkpoint is there already, and needs its segment
                shutil.rmtree(unfinished, ignore_errors=True)
                with contextlib.suppress(OSError):
                    segment_path.unlink(missing_ok=True)
            raise
        self._buffer, self._segments = buffer, segments
        with contextlib.suppress(OSError):  # the checkpoint is there; what is not removed now is at the next start
            _sync_folder(self.folder)
            self._remove_old()
        return path

    def _write_rows(self, path: pathlib.Path, buffer: MultiTaskReplayBuffer) -> list[Segment]:
        """Write the rows that no segment holds; return the segments of all rows that the buffer holds."""
        held = buffer.row_numbers()
        segments = self._segments if self._buffer is buffer else []
        segments = [segment for segment in segments if _holds_any(np.array(segment.ranges), held)]
        starts = np.maximum(held[:, 0], np.array(segments[-1].ranges)[:, 1] if segments else 0)
        if np.array_equal(starts, held[:, 1]):
            return segments
        row_bytes = 4 * buffer.row_width
        n_bytes = sum(segment.entry.n_bytes for segment in segments) + row_bytes * int((held[:, 1] - starts).sum())
        n_held_bytes = row_bytes * int((held[:, 1] - held[:, 0]).sum())
        if len(segments) >= MAX_SEGMENTS or n_bytes > MAX_BYTES_PER_HELD * n_held_bytes:
            segments, starts = [], held[:, 0]
        with HashingFile(path) as file:
            for task, (start, end) in enumerate(zip(starts.tolist(), held[:, 1].tolist(), strict=True)):
                for block in buffer.row_blocks(task, start, end):
                    file.write(block.data.cast("B"))
        _sync_folder(path.parent)
        ranges = np.stack([starts, held[:, 1]], axis=1).tolist()
        return [*segments, Segment(path.name, file.entry, ranges)]

    def _remove_old(self) -> None:
        # What cannot be read, or belongs to a branch that was given up, goes when so many newer ones are there, not before
        readable = [path for path in self.find() if _try_to_read_manifest(path) is not None]
        first_kept = _number(readable[-self.keep]) if len(readable) >= self.keep else 0
        for path in self.find():
            if _number(path) < first_kept:
                # Renamed first: half of a checkpoint must not look like one
                removed = self.folder / f"{_REMOVED}{path.name}"
                path.rename(removed)
                shutil.rmtree(removed)
        self._remove_unused_segments()

    def _remove_unused_segments(self) -> None:
        used: set[str] = set()
        for path in self.find():
            checkpoint = _try_to_read_manifest(path)
            if checkpoint is None:
                return  # whatever it refers to may be wanted when it can be read again
            used.update(segment.name for segment in checkpoint.segments)
        for path in (self.folder / ROWS).iterdir():
            if _SEGMENT_NAME.fullmatch(path.name) and path.name not in used and path.is_file() and not path.is_symlink():
                path.unlink()


def read_checkpoint(path: pathlib.Path) -> Checkpoint:
    """
    :param path: Folder of a checkpoint
    :return: The checkpoint, after all checksums were compared
    :raises BrokenCheckpointError: if it is not whole
    """
    checkpoint = read_manifest(path)
    for name, entry in checkpoint.files.items():
        _check_file(path / name, entry)
    for segment in checkpoint.segments:
        _check_file(path.parent / ROWS / segment.name, segment.entry)
    return checkpoint


def read_manifest(path: pathlib.Path) -> Checkpoint:
    """
    :param path: Folder of a checkpoint
    :return: What its manifest says
    :raises BrokenCheckpointError: if the manifest is not whole, or of another format
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        content, digest = manifest["content"], manifest["sha256"]
        if digest != _digest(content):
            raise BrokenCheckpointError(f"{file}: its checksum is wrong")
    except OSError as error:
        raise BrokenCheckpointError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BrokenCheckpointError):
            raise
        raise BrokenCheckpointError(f"{file}: it is no whole manifest ({type(error).__name__})") from error
    if content["format"] != FORMAT:
        raise BrokenCheckpointError(
            f"{file}: it has format {content['format']}, this version of sb3_mtrl reads format {FORMAT}"
        )
    return Checkpoint(
        path,
        content["timesteps"],
        content["description"],
        {name: FileEntry(*entry) for name, entry in content["files"].items()},
        [Segment(name, FileEntry(*entry), ranges) for name, entry, ranges in content["segments"]],
    )


def _try_to_read_manifest(path: pathlib.Path) -> Checkpoint | None:
    try:
        return read_manifest(path)
    except BrokenCheckpointError:
        return None


def _holds_any(ranges: np.ndarray, held: np.ndarray) -> bool:
    """Whether a segment with these ranges ``(T, 2)`` has rows that are held ``(T, 2)``."""
    return bool(np.any(np.maximum(ranges[:, 0], held[:, 0]) < np.minimum(ranges[:, 1], held[:, 1])))


def _check_file(path: pathlib.Path, entry: FileEntry) -> None:
    sha256 = hashlib.sha256()
    try:
        n_bytes = path.stat().st_size
        if n_bytes != entry.n_bytes:
            raise BrokenCheckpointError(f"{path}: it has {n_bytes} bytes instead of {entry.n_bytes}")
        for chunk in _read_chunks(path):
            sha256.update(chunk)
    except OSError as error:
        raise BrokenCheckpointError(f"{path}: {error.strerror}") from error
    if sha256.hexdigest() != entry.sha256:
        raise BrokenCheckpointError(f"{path}: its checksum is wrong")


def _read_chunks(path: pathlib.Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _number(path: pathlib.Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def _sync_folder(path: pathlib.Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # not on Windows
        return
    descriptor = os.open(path, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
