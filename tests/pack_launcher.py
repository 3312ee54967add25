"""Runs the command line in children of a process that has imported everything, each killed at a step if so wished.

Reads a line of JSON for each child: its "arguments", and perhaps "kill_at" a step, "kill_after" a file has its name,
"kill_after_s" so many seconds, "full_at" a step or "full_after" a file has its name the disk is full, "file_bytes" at
most in one file. Answers with a line, {"status": as of waitpid, "steps": taken, "out", "err"}.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

STEPS = ("fsync", "ftruncate", "mkdir", "open", "posix_fallocate", "pwrite", "rename", "rmdir", "unlink")
"""What changes a disk; a child counts these."""

taken: list[str] = []


def stepped(name: str, task: dict[str, Any]) -> Callable[..., Any]:
    """The function of `os`, which kills the process at one step, or fails there as a full disk would."""
    right = getattr(os, name)
    kill_at, kill_after = task.get("kill_at"), task.get("kill_after")

    def step(*args: Any, **kwargs: Any) -> Any:
        if name == "open" and not args[1] & os.O_CREAT:
            return right(*args, **kwargs)
        taken.append(name)
        if len(taken) == kill_at:
            if name == "pwrite":
                right(args[0], args[1][: len(args[1]) // 2], args[2])
            os.kill(os.getpid(), signal.SIGKILL)
        if len(taken) >= task.get("full_at", sys.maxsize) and name in ("pwrite", "posix_fallocate"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        result = right(*args, **kwargs)
        if name == "rename":
            done = os.path.basename(args[1])
            if done == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if done == task.get("full_after"):
                task["full_at"] = 0
        return result

    return step


def run(task: dict[str, Any], out: int, err: int, count: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    if task.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_bytes"], resource.RLIM_INFINITY))
    for name in STEPS:
        setattr(os, name, stepped(name, task))
    from moert.cli import main

    code = 1
    with contextlib.suppress(BaseException):
        code = main(task["arguments"])
    os.write(count, str(len(taken)).encode())
    os._exit(code)


def serve() -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM  # noqa: F401

    import moert.api
    import moert.hf.pack_check
    import moert.hf.packing  # noqa: F401

    for line in sys.stdin:
        task = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as count:
            child = os.fork()
            if child == 0:
                run(task, out.fileno(), err.fileno(), count.fileno())
            if "kill_after_s" in task:
                time.sleep(task["kill_after_s"])
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            texts = []
            for file in (count, out, err):
                file.seek(0)
                texts.append(file.read().decode())
        answer = {"status": status, "steps": int(texts[0] or 0), "out": texts[1], "err": texts[2]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
