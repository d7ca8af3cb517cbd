"""The steps of processes that vLLM or a script spawns, in order: each imports what the real ones have imported."""

import os
from argparse import Namespace
from multiprocessing import Queue


def configure(kind: str, args: Namespace, answers: "Queue[tuple[str, bool]]") -> None:
    """Answer whether requests without a scope are private, and whether the application has the response cache."""
    if kind == "LLM":
        from vllm.engine.arg_utils import EngineArgs

        EngineArgs(args.model, kv_transfer_config=args.kv_transfer_config).create_engine_config()
        classes = []
    else:
        from vllm.entrypoints.launchers.api_server.entry import AsyncEngineArgs, build_app

        engine = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        classes = [each.cls for each in build_app(args, ("generate",), engine.model_config).user_middleware]
    caches = "response_cache" in [getattr(each, "__name__", "") for each in classes]
    answers.put((os.environ["_HYPERSPACE_MANY_TENANTS"], caches))
