"""Real `vllm serve` processes on loopback for the demo, the benches and the end-to-end tests.

Each server is a separate process group with its own data directory, so it has its own node, keys and stores.
"""

import fcntl
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench.machine import ROOT, dtype

MODELS = {
    "gemma": ROOT / ".models" / "gemma-3-270m",
    "tiny": ROOT / ".models" / "tiny",
    "tiny-gemma3": ROOT / ".models" / "tiny-gemma3",
}


_machine: IO[str] | None = None


def have_machine(timeout_s: float = 3600) -> None:
    """Wait until no other run has servers up, then make others wait until this process ends.

    Two runs at once would measure each other, and need more memory than a small machine has.
    """
    global _machine
    if _machine is not None:
        return
    lock = (Path(tempfile.gettempdir()) / f"hyperspace-servers-{os.getuid()}.lock").open("w")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"another run has had servers up for {timeout_s:.0f} s ({lock.name})") from None
            time.sleep(0.5)
        else:
            break
    _machine = lock


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def hyperspace(*arguments: str, data_dir: Path) -> str:
    """Output of a `hyperspace` command on a data directory."""
    command = [sys.executable, "-m", "hyperspace_vllm.cli", *arguments, "--data-dir", str(data_dir)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@dataclass
class Completion:
    """One answer as its client saw it; times in milliseconds from sending the request."""

    text: str
    ttft_ms: float
    total_ms: float
    usage: dict[str, object]
    headers: dict[str, str]
    logprobs: list[dict[str, float]]
    tokens: list[str]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, by the server's own count."""
        return int(str(self.usage.get("prompt_tokens", 0)))

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was not computed for this request (vLLM's count)."""
        details = self.usage.get("prompt_tokens_details") or {}
        assert isinstance(details, dict)
        return int(details.get("cached_tokens") or 0)


class Server:
    """A running `vllm serve MODEL [--kv-connector hyperspace]`, or `program`; use as a context manager."""

    def __init__(
        self,
        name: str,
        model: Path,
        data_dir: Path,
        *,
        connector: bool = True,
        program: Sequence[str] | None = None,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        have_machine()
        self.name, self.model, self.data_dir = name, model, data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = data_dir / "vllm.log"
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = [
            *(program or (str(Path(sys.executable).parent / "vllm"), "serve", str(model))), "--host", "127.0.0.1",
            "--port", str(self.port), "--served-model-name", "demo", "--enforce-eager",
            "--max-model-len", "8192", "--max-num-seqs", "16", "--enable-prompt-tokens-details",
            "--dtype", dtype("pool" if "pooling" in arguments else "generate"),
            *(["--kv-connector", "hyperspace"] if connector else []), *arguments,
        ]  # fmt: skip
        self.environment = {
            **os.environ,
            "HYPERSPACE_DATA_DIR": str(data_dir),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **(environment or {}),
        }
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True, cwd=ROOT,
            )  # fmt: skip

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self, timeout_s: float = 300) -> Iterator[float]:
        """Yield the seconds waited until /health answers; RuntimeError with the log's end if it dies first."""
        start = time.monotonic()
        while (waited := time.monotonic() - start) < timeout_s:
            if self.process.poll() is not None:
                raise RuntimeError(f"server {self.name} ended with {self.process.returncode}:\n{self.log_tail()}")
            with suppress(OSError), urllib.request.urlopen(self.url + "/health", timeout=2):
                return
            yield waited
            time.sleep(0.25)
        raise RuntimeError(f"server {self.name} was not ready after {timeout_s:.0f} s:\n{self.log_tail()}")

    def ready(self, timeout_s: float = 300) -> "Server":
        """Wait until the server answers."""
        for _ in self.wait_ready(timeout_s):
            pass
        return self

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def complete(
        self,
        prompt: str,
        *,
        max_tokens: int = 24,
        headers: dict[str, str] | None = None,
        timeout_s: float = 300,
        **fields: object,
    ) -> Completion:
        """One streamed greedy completion."""
        body = {
            "model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **fields,
        }  # fmt: skip
        return self._stream("/v1/completions", body, headers or {}, timeout_s)

    def _stream(self, path: str, body: dict[str, object], headers: dict[str, str], timeout_s: float) -> Completion:
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "X-Hyperspace-Proof": "1", **headers},
        )
        start = time.perf_counter()
        answer = Completion("", 0.0, 0.0, {}, {}, [], [])
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer.headers = {k.lower(): v for k, v in response.headers.items()}
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                frame = json.loads(line[6:])
                if "error" in frame:
                    raise RuntimeError(f"server {self.name}: {frame['error']}")
                for choice in frame.get("choices", ()):
                    if not answer.ttft_ms:
                        answer.ttft_ms = (time.perf_counter() - start) * 1000
                    answer.text += choice.get("text") or ""
                    if choice.get("logprobs"):
                        answer.logprobs += choice["logprobs"]["top_logprobs"]
                        answer.tokens += choice["logprobs"]["tokens"]
                answer.usage = frame.get("usage") or answer.usage
        answer.total_ms = (time.perf_counter() - start) * 1000
        return answer

    def metrics(self) -> dict[str, float]:
        """vLLM's /metrics as {sample with labels: value}."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def metric(self, prefix: str, *labels: str) -> float:
        """Sum of the samples whose name starts with `prefix` and whose labels contain every one of `labels`."""
        return sum(
            value
            for name, value in self.metrics().items()
            if name.startswith(prefix) and all(label in name for label in labels)
        )

    def node_status(self) -> dict[str, object]:
        """What `hyperspace status --json` prints for this server's node."""
        status: dict[str, object] = json.loads(hyperspace("status", "--json", data_dir=self.data_dir))
        return status

    def signal_group(self, number: int) -> None:
        """Send a signal to every process of the server (its node is not one of them)."""
        left = ring_buffers(self.process.pid) if number == signal.SIGKILL else set()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        for path in left:
            path.unlink(missing_ok=True)

    def stop(self, timeout_s: float = 30) -> None:
        """End the server: first with a signal to exit, then by force."""
        left = ring_buffers(self.process.pid)  # vLLM kills its own processes that don't end in time
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        self.signal_group(signal.SIGKILL)
        self.process.wait(10)
        for path in left:
            path.unlink(missing_ok=True)


def ring_buffers(group: int) -> set[Path]:
    """Python's shared memory that processes of the group have mapped: killed processes would leave it behind."""
    found: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or gone
            if os.getpgid(int(process.name)) == group:
                maps = (process / "maps").read_text()
                found.update(map(Path, re.findall(r" (/dev/shm/psm_[0-9a-f]+)$", maps, re.MULTILINE)))
    return found


def introduce(directories: Sequence[Path], ports: Sequence[int]) -> list[dict[str, str]]:
    """Make the key of each data directory and return environments in which each node lists all the others."""
    addresses = [
        f"{hyperspace('id', data_dir=directory).strip()}@127.0.0.1:{port}"
        for directory, port in zip(directories, ports, strict=True)
    ]
    return [
        {
            "HYPERSPACE_LISTEN": f"127.0.0.1:{port}",
            "HYPERSPACE_PEERS": ",".join(a for a in addresses if a != address),
        }
        for address, port in zip(addresses, ports, strict=True)
    ]


def found_network(directories: Sequence[Path], port: int) -> list[dict[str, str]]:
    """Environments of a private network: every node has its key, and only the first one's address."""
    key_file = directories[0].parent / "network.key"
    key_file.touch(0o600)
    key_file.write_text(secrets.token_hex(32))
    first = f"{hyperspace('id', data_dir=directories[0]).strip()}@127.0.0.1:{port}"
    joining = {"HYPERSPACE_NETWORK_KEY_FILE": str(key_file)}
    return [
        {**joining, "HYPERSPACE_P2P_LISTEN": f"127.0.0.1:{port}"},
        *({**joining, "HYPERSPACE_BOOTSTRAP": first} for _ in directories[1:]),
    ]
