"""A worker process that does what each request says: `python -m tests.support.worker_child NICE`."""

import os
import time

from hyperspace_vllm.daemon.workers.worker_frames import lower_priority, next_request, reply, say_ready


def main() -> None:
    lower_priority()
    say_ready()
    while (request := next_request()) is not None:
        match request.partition(b" "):
            case b"sleep", _, seconds:
                time.sleep(float(seconds))
                reply(b"slept")
            case b"exit", _, _:
                os._exit(1)
            case b"niceness", _, _:
                reply(str(os.getpriority(os.PRIO_PROCESS, 0)).encode())
            case b"long", _, size:
                reply(bytes(int(size)))
            case _:
                reply(request)


if __name__ == "__main__":
    main()
