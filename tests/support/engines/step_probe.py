"""One engine in a separate process, stepped by the test: JSON lines in, JSON lines out."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench.machine import dtype
from bench.servers import have_machine
from tests.support.paths import ROOT

START_S = 240.0
ANSWER_S = 120.0


class SteppedEngine:
    """The test's end. `settings` are Hyperspace's, `options` vLLM's; every wait has a deadline."""

    def __init__(self, model: Path, settings: dict[str, Any], **options: Any) -> None:
        have_machine()
        spec = {"model": str(model), "settings": settings, "options": options}
        env = {k: v for k, v in os.environ.items() if "HYPERSPACE" not in k} | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        self.log: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.engines.step_probe", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            cwd=ROOT,
        )
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._answer(START_S)

    def generate(self, *prompts: list[int], max_tokens: int = 4) -> dict[str, Any]:
        """Greedy `tokens` and `cached` prompt tokens of each prompt, and the `seconds` that all took together."""
        return self.ask("generate", prompts=prompts, max_tokens=max_tokens)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """One command of `_Probe` and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer(ANSWER_S)

    def close(self) -> None:
        """End the process, by force if need be."""
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


class _Probe:
    def __init__(self, model: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig

        transfer = KVTransferConfig(kv_connector="hyperspace", kv_role="kv_both", kv_connector_extra_config=settings)
        options = {
            "dtype": dtype("generate"),
            "max_model_len": 4096,
            "enforce_eager": True,
            "disable_log_stats": False,
            **options,
        }
        self.sampling = SamplingParams
        self.llm = LLM(model=model, kv_transfer_config=transfer, **options)
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.side = self.scheduler.connector._scheduler
        self.client = self.scheduler.connector._client
        self.counts: dict[str, dict[str, int]] = {}
        self.preemptions = 0
        self.loads: list[str | None] = []  # why each load failed, None where it didn't, since `kill_after_promise`
        preempt = self.scheduler._preempt_request

        def preempted(*arguments: Any, **named: Any) -> Any:
            self._preempted()
            return preempt(*arguments, **named)

        self.scheduler._preempt_request = preempted
        if self.side is not None:
            take = self.side.stats.take
            self.side.stats.take = lambda: self._counted(take())
            self.misses: list[tuple[str, float]] = []  # reason, seconds that the request waited for it
            settle = self.side._settle

            def settled(tracked: Any, reason: str) -> Any:
                self._missed(tracked, reason)
                return settle(tracked, reason)

            self.side._settle = settled

    def _counted(self, stats: Any) -> Any:
        for name, values in (stats.data if stats is not None else {}).items():
            if isinstance(values, dict):
                total = self.counts.setdefault(name, {})
                total.update({key: total.get(key, 0) + value for key, value in values.items()})
        return stats

    def _missed(self, tracked: Any, reason: str) -> None:
        waited_s = time.monotonic() - tracked.lookup.asked_s if tracked.lookup is not None else 0.0
        self.misses.append((reason, waited_s))

    def _preempted(self) -> None:
        self.preemptions += 1

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        start = time.monotonic()
        params = self.sampling(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params, use_tqdm=False)
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
            "seconds": time.monotonic() - start,
        }

    def abort(self, tokens: list[int], steps: int) -> dict[str, Any]:
        """Start a request, take `steps` engine steps, abort it, and step until the engine is idle."""
        engine = self.llm.llm_engine
        name = f"abort-{steps}-{time.monotonic_ns()}"
        engine.add_request(name, {"prompt_token_ids": tokens}, self.sampling(max_tokens=32, ignore_eos=True))
        seen = []
        for _ in range(steps):
            engine.step()
            seen += [request.status.name for request in self.scheduler.requests.values()]
        engine.abort_request([name])
        deadline = time.monotonic() + 20
        while self.scheduler.has_requests() and time.monotonic() < deadline:
            engine.step()
        left = [len(self.scheduler.requests), len(self.side._tracked), len(self.side._lookups)]
        return {"left": left, "seen": seen}

    def reset(self, connector: bool) -> dict[str, Any]:
        """Empty vLLM's own prefix cache, and renew the connector's keys if asked for."""
        return {"ok": self.scheduler.reset_prefix_cache(reset_connector=connector)}

    def spoil(self, method: str) -> dict[str, Any]:
        """From now on `method` of the worker's half raises."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        setattr(get_kv_transfer_group()._worker, method, lambda *_: 1 / 0)
        return {}

    def in_memory(self, tokens: list[int]) -> dict[str, Any]:
        """How many segments the node was told of, and which of a prompt's are among them."""
        from hyperspace_vllm.core.prefix.segment import chain_seed, segment_keys

        told = self.scheduler.connector._report._told
        keys = segment_keys(chain_seed(self.side._fingerprint(), b"", "", ""), tokens, self.side._plan.segment_tokens)
        return {"told": len(told), "of_prompt": [key in told for key in keys]}

    def kill_after_promise(self, pid: int) -> dict[str, Any]:
        """Kill the node between the next promise of a load and the load itself."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        step, worker = self.side.step, get_kv_transfer_group()
        settle = worker._worker._settle

        def settled(*result: Any) -> Any:
            self.loads.append(result[1])
            return settle(*result)

        worker._worker._settle = settled

        def step_and_kill(output: Any) -> Any:
            metadata = step(output)
            if metadata.loads:
                self.side.step = step
                os.kill(pid, signal.SIGKILL)
                deadline = time.monotonic() + 20
                while worker._client.connected and time.monotonic() < deadline:
                    time.sleep(0.01)
            return metadata

        self.side.step = step_and_kill
        return {}

    def state(self) -> dict[str, Any]:
        connected = self.client is not None and self.client.connected
        return {
            "on": self.scheduler.connector._scheduler is not None,
            "connected": connected,
            "counts": self.counts,
            "preemptions": self.preemptions,
            "loads": self.loads,
            "last_miss": self.misses[-1] if self.side is not None and self.misses else None,
        }


def _main() -> None:
    spec = json.loads(sys.argv[1])
    probe = _Probe(spec["model"], spec["settings"], spec["options"])
    print("@@" + json.dumps({"started": True}), flush=True)
    for line in sys.stdin:
        arguments = json.loads(line)
        answer = getattr(probe, arguments.pop("command"))(**arguments)
        print("@@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
