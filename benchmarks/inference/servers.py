"""The servers that are measured, each in a process of its own; its addresses go to standard output as JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

SERVED = "bench"


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


async def serve_ours(options: argparse.Namespace) -> None:
    """Serve Loraline's inference stage, keys on, as `python -m loraline.inference` does."""
    from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_ADAPTER
    from loraline.core.config import CoreSettings
    from loraline.core.serving.component import Component, Platform
    from loraline.core.serving.server import serve
    from loraline.inference.component import build
    from loraline.inference.config import InferenceSettings

    if options.mock:
        _put_mock_under_our_engine(options)
    core = CoreSettings(
        data_dir=Path(options.folder), listen="127.0.0.1:0", metrics_listen="", allowed_paths=[Path(options.model)]
    )
    limits = {} if options.coalesce is None else {"coalesce_seconds": options.coalesce}
    settings = InferenceSettings(
        engine="vllm", model=options.model, served_name=SERVED, http_listen="127.0.0.1:0", max_model_len=2048,
        max_lora_rank=16, max_loaded_adapters=8, max_batch_adapters=8, **limits,
    )  # fmt: skip
    keys: list[str] = []
    built: list[Component] = []

    def make(platform: Platform) -> Component:
        for adapter in map(Path, options.adapter):
            platform.library.publish(ARTIFACT_KIND_ADAPTER, adapter.name, adapter)
        built.append(build(platform, settings))
        return built[0]

    async def tell(addresses: Any) -> None:
        while built[0].extra["host"].why_not_ready:
            await asyncio.sleep(0.05)
        told = {"grpc": addresses.grpc, "http": addresses.http["inference"], "key": keys[0]}
        print(json.dumps(told), flush=True)

    telling: list[asyncio.Task[None]] = []
    await serve(
        core, [make], ready=lambda found: telling.append(asyncio.create_task(tell(found))), first_key=keys.append
    )


def _put_mock_under_our_engine(options: argparse.Namespace) -> None:
    from mock_llm import mock_of

    from loraline.inference.engines import vllm_engine

    vllm_engine.build = lambda *_: mock_of(options.model, merge=not options.one_by_one, stamped=options.stamped)  # type: ignore[assignment]


def serve_vllm(options: argparse.Namespace) -> None:
    """Serve vLLM's own OpenAI front over the mock, with uvloop, as `vllm serve` does."""
    import uvloop
    from mock_llm import mock_of
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    port = free_port()
    given = ["--model", options.model, "--served-model-name", SERVED, "--host", "127.0.0.1", "--port", str(port)]
    given += ["--max-model-len", "2048", "--disable-uvicorn-access-log"]
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    assert arguments is not None
    validate_parsed_serve_args(arguments)

    async def run() -> None:
        mock = mock_of(options.model, stamped=options.stamped)
        address, listener = setup_server(arguments, reuse_port=False)
        telling = asyncio.create_task(tell())
        await (await build_and_serve(mock, address, listener, arguments))  # type: ignore[arg-type]
        await telling

    async def tell() -> None:
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            break
        print(json.dumps({"grpc": "", "http": f"127.0.0.1:{port}", "key": ""}), flush=True)

    uvloop.run(run())


def main() -> None:
    """Serve until the process is ended."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("kind", choices=["ours", "vllm"])
    arguments.add_argument("model")
    arguments.add_argument("folder")
    arguments.add_argument("--mock", action="store_true")
    arguments.add_argument("--one-by-one", action="store_true")
    arguments.add_argument("--stamped", action="store_true")
    arguments.add_argument("--coalesce", type=float)
    arguments.add_argument("--adapter", action="append", default=[])
    options = arguments.parse_args()
    from loraline.core import logging as platform_logging

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if options.kind == "ours":
        platform_logging.configure(level="warning")
        asyncio.run(serve_ours(options))
    else:
        serve_vllm(options)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
