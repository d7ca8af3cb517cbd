"""Digests of whole files, kept between starts and shared between processes."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hyperspace_vllm import file_digests
from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.file_digests import FileDigests, FileState, in_progress


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(3 * file_digests.READ_BYTES + 5))
    return path


def digest(tmp_path: Path, *states: FileState) -> dict[str, str]:
    return FileDigests(tmp_path / "data").digest("a model", states)


def test_every_byte_counts(tmp_path: Path, weights: Path) -> None:
    content = weights.read_bytes()
    state = FileState.of(str(weights))
    assert digest(tmp_path, state) == {str(weights): hashlib.sha256(content).hexdigest()}
    for position in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        weights.write_bytes(changed)
        assert digest(tmp_path, FileState.of(str(weights))) == {str(weights): hashlib.sha256(changed).hexdigest()}


def test_a_file_is_read_once_however_often_it_is_asked_for(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "second.safetensors"
    other.write_bytes(b"other")
    states = [FileState.of(str(path)) for path in (weights, other)]
    first = digest(tmp_path, *states)
    read: list[str] = []
    real = FileState.hash

    def noted(self: FileState, advance: Callable[[int], None]) -> str:
        read.append(self.path)
        return real(self, advance)

    monkeypatch.setattr(FileState, "hash", noted)
    assert digest(tmp_path, *states) == first
    assert not read
    other.write_bytes(b"changed")
    assert digest(tmp_path, states[0], FileState.of(str(other))) != first
    assert read == [str(other)]  # only what changed


@pytest.mark.parametrize("device", [None, "/dev/zero"])
def test_a_file_that_became_a_pipe_or_a_device_is_refused_and_not_read(tmp_path: Path, device: str | None) -> None:
    path = tmp_path / "model.safetensors"
    if device is None:
        os.mkfifo(path)
    else:
        path.symlink_to(device)
    code = "import sys; from pathlib import Path; from hyperspace_vllm.file_digests import FileDigests, FileState\n"
    code += "FileDigests(Path(sys.argv[2])).digest('m', [FileState.of(sys.argv[1])])"
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "data")]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=20)
    assert f"unreadable: {path}: not a regular file" in done.stderr


def test_a_file_that_is_not_what_it_was_is_refused(tmp_path: Path, weights: Path) -> None:
    state = FileState.of(str(weights))
    with weights.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(Refused, match="changed after it was loaded"):
        digest(tmp_path, state)
    weights.unlink()
    with pytest.raises(Refused, match="unreadable"):
        digest(tmp_path, state)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, weights: Path) -> None:
    def overwrite(count: int) -> None:
        with weights.open("r+b") as file:
            file.write(b"x")

    with pytest.raises(Refused, match="changed after it was loaded"):
        FileState.of(str(weights)).hash(overwrite)


def test_a_restored_time_does_not_hide_a_change(tmp_path: Path, weights: Path) -> None:
    before = weights.stat()
    state = FileState.of(str(weights))
    with weights.open("r+b") as file:
        file.write(b"x")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Refused, match="changed after it was loaded"):
        digest(tmp_path, state)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[[1]]", b"\xff", b'[["p", 1, 2, 3, 4, "x"]]'])
def test_a_damaged_record_is_read_anew(tmp_path: Path, weights: Path, damage: bytes) -> None:
    state = FileState.of(str(weights))
    right = digest(tmp_path, state)
    (record,) = (tmp_path / "data" / "digests").glob("*.json")
    record.write_bytes(damage)
    assert digest(tmp_path, state) == right


def test_reading_lowers_the_priority_of_the_thread_that_reads_and_never_of_a_process(
    tmp_path: Path, weights: Path
) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    priorities = []

    def read() -> None:
        digest(tmp_path, FileState.of(str(weights)))
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    reader = threading.Thread(target=read)
    reader.start()
    reader.join()
    (tmp_path / "data").rename(tmp_path / "aside")  # so that it is read again
    read()
    assert priorities == [max(own, file_digests._NICE), own]


def test_records_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digests, "RECORDS_MAX", 3)
    for number in range(5):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(b"x")
        digest(tmp_path, FileState.of(str(path)))
    assert len(list((tmp_path / "data" / "digests").iterdir())) == 3


def test_a_name_that_is_no_text_does_not_matter(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.bin")
    Path(path).write_bytes(b"x")
    assert digest(tmp_path, FileState.of(path)) == {path: hashlib.sha256(b"x").hexdigest()}


def test_progress_is_seen_while_a_file_is_read_and_not_after(tmp_path: Path, weights: Path) -> None:
    seen: list[object] = []
    data = tmp_path / "data"

    class Watched(FileState):  # a process that looks at each step
        def hash(self, advance: object) -> str:
            def told(count: int) -> None:
                advance(count)  # type: ignore[operator]
                seen.extend(in_progress(data))

            return super().hash(told)

    FileDigests(data).digest("a model", [Watched.of(str(weights))])
    size = weights.stat().st_size
    assert seen[0] == {"title": "a model", "done_bytes": file_digests.READ_BYTES, "total_bytes": size}
    assert in_progress(data) == []


@pytest.mark.io
def test_processes_that_want_the_same_file_at_once_read_it_once(tmp_path: Path, weights: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from hyperspace_vllm.file_digests import FileDigests, FileState\n"
        "real = FileState.hash\n"
        "FileState.hash = lambda self, advance: (print('read', flush=True), real(self, advance))[1]\n"
        "sys.stdin.readline(); print(*FileDigests(Path(sys.argv[1])).digest('m', [FileState.of(sys.argv[2])]).values())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "data"), str(weights)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [""] * len(processes)

    def run(number: int) -> None:
        outputs[number] = processes[number].communicate("go\n", timeout=60)[0]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = "".join(outputs).split()
    assert said.count("read") == 1
    assert said.count(hashlib.sha256(weights.read_bytes()).hexdigest()) == len(processes)


@pytest.mark.io
def test_a_reader_that_dies_leaves_the_work_to_the_next(tmp_path: Path, weights: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from hyperspace_vllm.file_digests import FileDigests, FileState\n"
        "FileState.hash = lambda self, advance: (print('reading', flush=True), sys.stdin.readline())[1]\n"
        "FileDigests(Path(sys.argv[1])).digest('m', [FileState.of(sys.argv[2])])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "data"), str(weights)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.kill()
    began = time.monotonic()
    assert digest(tmp_path, FileState.of(str(weights)))
    assert time.monotonic() - began < 30


def test_what_can_not_be_kept_is_used_all_the_same(tmp_path: Path, weights: Path) -> None:
    state = FileState.of(str(weights))
    first = digest(tmp_path, state)
    (record,) = (tmp_path / "data" / "digests").glob("*.json")
    record.unlink()
    (record / "in the way").mkdir(parents=True)
    assert digest(tmp_path, state) == first


def test_drafts_of_readers_that_were_killed_leave_the_directory(tmp_path: Path, weights: Path) -> None:
    directory = tmp_path / "data" / "digests"
    directory.mkdir(parents=True)
    old, fresh = ([directory / f"{name}.part", directory / f"{name}.1234-1235"] for name in ("a" * 32, "b" * 32))
    for path in (*old, *fresh):
        path.touch()
    for path in old:
        os.utime(path, (0, 0))
    digest(tmp_path, FileState.of(str(weights)))
    assert set(directory.iterdir()) - set(directory.glob("*.json")) == set(fresh)
