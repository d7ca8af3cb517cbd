"""An offline `LLM()` in a separate process, driven over pipes: one pickled request in, one pickled answer out.

The parent is this same repository, so pickle is fine here.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.machine import dtype
from bench.servers import have_machine
from tests.support.paths import ROOT


class Engine:
    """The parent's end."""

    def __init__(self, model: Path, environment: dict[str, str], log: Path, **llm: object) -> None:
        have_machine()
        self._log = log
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.engines.engine_process"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT,
                process_group=0,  # not a session: spinning ranks would starve the nodes (node_process.py says why)
                env={
                    **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment,
                },
            )  # fmt: skip
        self._send({"model": str(model), "dtype": dtype("generate"), **llm})

    def _send(self, request: object) -> None:
        assert self._process.stdin is not None
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except EOFError:
            raise RuntimeError("engine ended:\n" + self._log.read_text(errors="replace")[-4000:]) from None

    def ready(self) -> None:
        """Wait until the model is loaded."""
        assert self._receive() == "ready"

    def generate(self, tokens: list[int], max_tokens: int = 1, salt: str | None = None) -> tuple[list[int], int]:
        """Greedy output tokens, and how many prompt tokens were not computed."""
        self._send(("generate", tokens, max_tokens, salt))
        output, cached = self._receive()
        return output, cached

    def copied(self) -> list[dict[str, dict[tuple[str, int], bytes]]]:
        """What each worker saved and loaded since the last call."""
        self._send(("copied",))
        result: list[dict[str, dict[tuple[str, int], bytes]]] = self._receive()
        return result

    def reset_local_cache(self) -> None:
        """Reset vLLM's own prefix cache, not ours."""
        self._send(("reset",))
        assert self._receive() is True

    def close(self) -> None:
        """End the engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # vLLM prints to stdout
    requests = sys.stdin.buffer
    settings = pickle.load(requests)

    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    from tests.support.engines import worker_probe

    def answer(value: object) -> None:
        pickle.dump(value, answers)
        answers.flush()

    llm = LLM(
        enforce_eager=True, max_num_seqs=4, max_model_len=4096,
        kv_transfer_config=KVTransferConfig(kv_connector="hyperspace", kv_role="kv_both"), **settings,
    )  # fmt: skip
    # Not through the engine: a call that it doesn't know may change the weights, and ends all sharing.
    workers = llm.llm_engine.model_executor
    workers.collective_rpc(worker_probe.install)
    answer("ready")
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        match request:
            case ("generate", tokens, max_tokens, salt):
                prompt: dict[str, Any] = {"prompt_token_ids": tokens}
                if salt:
                    prompt["cache_salt"] = salt
                sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
                [result] = llm.generate([prompt], sampling, use_tqdm=False)
                answer((list(result.outputs[0].token_ids), result.num_cached_tokens))
            case ("copied",):
                answer(workers.collective_rpc(worker_probe.take))
            case ("reset",):
                answer(llm.reset_prefix_cache())


if __name__ == "__main__":
    _serve()
