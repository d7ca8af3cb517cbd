"""One real engine in a process of its own, told what to do by JSON lines; `Engine` is the test's end of it.

    python tests/engine_probe.py '{"model": ..., "settings": {...}, "options": {...}}'

Besides generating it reads back, block by block, the KV that its workers saved or loaded.
"""

import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

START_S = 180.0
ANSWER_S = 120.0


class Engine:
    """A running probe. `settings` are Hyperspace's, `options` vLLM's; every wait ends."""

    def __init__(self, model: Path, settings: dict[str, Any], environ: dict[str, str] | None = None, **options: Any):
        spec = {"model": str(model), "settings": settings, "options": options}
        env = {k: v for k, v in os.environ.items() if "HYPERSPACE" not in k} | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            **(environ or {}),
        }
        self.log: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def started(self) -> "Engine":
        """Wait until it serves."""
        self._answer(START_S)
        return self

    def generate(self, tokens: list[int], max_tokens: int = 4, **options: Any) -> dict[str, Any]:
        """Output `tokens`, `cached` prompt tokens, `seconds`, and the `blocks` it saved and loaded (see `_blocks`)."""
        answer = self.ask("generate", tokens=tokens, max_tokens=max_tokens, **options)
        path = Path(answer["blocks"])
        answer["blocks"] = pickle.loads(path.read_bytes())
        path.unlink()
        return answer

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """One command and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer(ANSWER_S)

    def close(self) -> None:
        """End the process, if need be by force."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError("no answer; the engine said:\n" + "".join(self.log[-60:])) from None
        assert "died" not in answer, "the engine died:\n" + "".join(self.log[-60:])
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@@"):
                self._answers.put(json.loads(line[2:]))
            else:
                self.log.append(line)
        self._answers.put({"died": self._process.wait()})


def read_blocks(_worker: Any, part: int, tables: dict[int, list[int]]) -> tuple[int, bytes]:
    """In a worker: its rank, and the bytes of these blocks in the order of a row."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    side = get_kv_transfer_group()._worker
    plan = side._plan.parts[part]
    row = bytearray(plan.block_row_bytes * len(next(iter(tables.values()))))
    side._copier.gather(plan, tables, memoryview(row), lambda: None)
    return side._rank, bytes(row)


class _Probe:
    def __init__(self, model: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        transfer = KVTransferConfig(kv_connector="hyperspace", kv_role="kv_both", kv_connector_extra_config=settings)
        options = {"max_model_len": 4096, "enforce_eager": True, "disable_log_stats": False, **options}
        self.llm = LLM(model=model, kv_transfer_config=transfer, **options)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.side = self.core.scheduler.connector._scheduler
        self.steps: list[Any] = []
        self.counts: dict[str, dict[str, int]] = {}
        if self.side is not None:
            step = self.side.step
            self.side.step = lambda output: self.steps.append(step(output)) or self.steps[-1]
            take = self.side.stats.take
            self.side.stats.take = lambda: self._counted(take())

    def _counted(self, stats: Any) -> Any:
        for name, values in (stats.data if stats is not None else {}).items():
            if isinstance(values, dict):
                total = self.counts.setdefault(name, {})
                total.update({key: total.get(key, 0) + value for key, value in values.items()})
        return stats

    def generate(self, tokens: list[int], max_tokens: int, salt: str | None = None) -> dict[str, Any]:
        from vllm import SamplingParams

        self.steps.clear()
        prompt: dict[str, Any] = {"prompt_token_ids": tokens} | ({"cache_salt": salt} if salt else {})
        start = time.monotonic()
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        (output,) = self.llm.generate(prompt, params, use_tqdm=False)  # type: ignore[arg-type]
        seconds = time.monotonic() - start
        path = f"/tmp/hyperspace-probe-{os.getpid()}.pickle"
        Path(path).write_bytes(pickle.dumps(self._blocks()))
        return {
            "tokens": list(output.outputs[0].token_ids),
            "cached": output.num_cached_tokens,
            "seconds": seconds,
            "blocks": path,
        }

    def _blocks(self) -> dict[str, dict[tuple[int, int, int], bytes]]:
        """'saved' and 'loaded': (part, block number of the prompt, rank) -> bytes of all the part's layers."""
        found: dict[str, dict[tuple[int, int, int], bytes]] = {"saved": {}, "loaded": {}}
        for step in self.steps:
            for save in step.saves:
                for part in save.parts:
                    plan = self.side._plan.parts[part]
                    first = save.segment * self.side._plan.segment_tokens // plan.block_tokens
                    self._read("saved", found, part, first, save.blocks)
            for load in step.loads:
                for part, plan in enumerate(self.side._plan.parts):
                    first = max(load.start_token // plan.block_tokens, plan.first_needed_block(load.end_token))
                    last = load.end_token // plan.block_tokens
                    self._read("loaded", found, part, first, [table[first:last] for table in load.blocks])
        return found

    def _read(self, kind: str, found: Any, part: int, first: int, tables: Any) -> None:
        plan = self.side._plan.parts[part]
        ids = {group: list(tables[group]) for group in {layer.group for layer in plan.layers}}
        for rank, row in self.llm.collective_rpc(read_blocks, args=(part, ids)):
            for number in range(len(row) // plan.block_row_bytes):
                block = row[number * plan.block_row_bytes : (number + 1) * plan.block_row_bytes]
                found[kind][part, first + number, rank] = block

    def abort(self, tokens: list[int], steps: int) -> dict[str, Any]:
        """Start a request, take `steps` engine steps, abort it, and step until the engine is idle."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        name = f"abort-{time.monotonic_ns()}"
        engine.add_request(name, {"prompt_token_ids": tokens}, SamplingParams(max_tokens=32, ignore_eos=True))
        for _ in range(steps):
            engine.step()
        engine.abort_request([name])
        deadline = time.monotonic() + 20
        while self.core.scheduler.has_requests() and time.monotonic() < deadline:
            engine.step()
        return {
            "left": len(self.core.scheduler.requests),
            "tracked": len(self.side._tracked),
            "lookups": len(self.side._lookups),
        }

    def reset(self, connector: bool = False) -> dict[str, Any]:
        return {"ok": self.core.scheduler.reset_prefix_cache(reset_connector=connector)}

    def state(self) -> dict[str, Any]:
        client = self.core.scheduler.connector._client
        return {
            "counts": self.counts,
            "on": self.side is not None,
            "connected": client is not None and client.connected,
        }


def _main() -> None:
    spec = json.loads(sys.argv[1])
    probe = _Probe(spec["model"], spec["settings"], spec["options"])
    print("@@" + json.dumps({"started": True}), flush=True)
    for line in sys.stdin:
        arguments = json.loads(line)
        answer = getattr(probe, arguments.pop("command"))(**arguments)
        print("@@" + json.dumps(answer), flush=True)
    probe.core.shutdown()


if __name__ == "__main__":
    _main()
