"""Small job handlers for tests of the job engine: they count, checkpoint, crash, publish and stop on request.

Every kind takes a `google.protobuf.Struct`, so that tests can say what a job does without a proto of their own. A
Struct has no request_id; tests of idempotency use messages that do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from loraline.api.artifact.v1 import artifact_pb2
from loraline.core.errors import invalid_argument
from loraline.core.jobs.context import JobContext
from loraline.core.jobs.handlers import JobHandler, JobPaused


def _handler(name: str) -> JobHandler:
    return JobHandler(f"test.{name}", Struct, f"{__name__}:{name}")


def struct(**values: Any) -> Struct:
    """Return a Struct with these values."""
    message = Struct()
    message.update(values)
    return message


def _values(request: Struct) -> dict[str, Any]:
    return MessageToDict(request)


def count(context: JobContext, request: Struct) -> Struct:
    """Count to `to`, `seconds` a step, with a checkpoint after each; keeps counting where an earlier attempt stopped.

    Each step is a line in `steps.txt`, so tests see steps done twice. `publish` names a dataset to publish at the end;
    `stubborn` ignores wishes to stop.
    """
    wish = _values(request)
    goal, seconds = int(wish["to"]), float(wish["seconds"])
    checkpoint = context.workdir / "checkpoint.json"
    done = json.loads(checkpoint.read_text()) if checkpoint.exists() else 0
    context.note(f"Start at {done}", reason="COUNT_START", done=done)
    while done < goal:
        if not wish.get("stubborn"):
            context.check_stop()
        time.sleep(seconds)
        done += 1
        with (context.workdir / "steps.txt").open("a") as steps:
            steps.write(f"{done} {context.attempt}\n")
        save(checkpoint, done)
        context.count("test_steps", parity="odd" if done % 2 else "even")
        context.gauge("test_step", done)
        context.progress(step=done, total_steps=goal, unit="step", metrics={"loss": 1.0 / done})
    if "publish" in wish:
        folder = context.workdir / "result"
        folder.mkdir(exist_ok=True)
        # The attempt is part of the content: a second publish could not pass for the first.
        (folder / "train.jsonl").write_text(json.dumps({"attempt": context.attempt, "time": time.time()}) + "\n")
        context.publish(artifact_pb2.ARTIFACT_KIND_DATASET, wish["publish"], folder, facts={"rows": 1})
        time.sleep(wish.get("linger", 0.0))
    return struct(done=done)


def save(path: Path, value: Any) -> None:
    """Write JSON so that a kill leaves the old or the new content."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


def crash(context: JobContext, request: Struct) -> None:
    """Fail in the way that `how` names."""
    how = _values(request)["how"]
    print("about to fail; api_key=sk-verysecretvalue123", file=sys.stderr, flush=True)
    if how == "exception":
        raise ValueError("the flux is out of range")
    if how == "typed":
        raise invalid_argument("ROW_INVALID", "Row 7 of train.jsonl has no messages.", rows="7")
    if how == "memory":
        raise MemoryError
    if how == "disk":
        raise OSError(28, "No space left on device", "/data/checkpoint")
    if how == "exit":
        os._exit(3)
    if how == "sys_exit":
        sys.exit("a library thought it may do this")
    if how == "abort":
        os.abort()
    os.kill(os.getpid(), signal.SIGKILL)


def quota(context: JobContext, request: Struct) -> None:
    """Pause for an exhausted quota at the first attempt, succeed at the second."""
    context.progress(fraction=0.25, message="asking")
    if context.attempt == 1:
        raise JobPaused("QUOTA_EXHAUSTED", "The day's requests are used up.")


def family(context: JobContext, request: Struct) -> None:
    """Start a grandchild, write its process id to `grandchild.pid`, and wait."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    (context.workdir / "grandchild.pid").write_text(str(child.pid))
    while True:
        context.check_stop()
        time.sleep(0.05)


def slow_import(context: JobContext, request: Struct) -> None:
    """Load a library for half a minute, without asking once whether to stop."""
    context.progress(fraction=0.1, metrics={"loss": 2.0})
    with context.loading():
        (context.workdir / "loading").touch()
        for _ in range(600):
            time.sleep(0.05)


COUNT, CRASH, QUOTA, FAMILY, SLOW_IMPORT = (
    _handler(name) for name in ("count", "crash", "quota", "family", "slow_import")
)
HANDLERS = (COUNT, CRASH, QUOTA, FAMILY, SLOW_IMPORT)
