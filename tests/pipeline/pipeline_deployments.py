"""The two ways to deploy the platform, started for real: one process, or four with S3 and Postgres between them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loraline.core.serving.addresses import free_port

STAGES = ("datagen", "trainer", "merger", "inference")
START_SECONDS = 90


@dataclass
class Deployment:
    """What a client needs to know, and the processes behind it."""

    name: str
    environment: dict[str, str]
    """For the client: addresses and key."""
    http: str
    """Base URL of the OpenAI-compatible front."""
    key: str
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    """Service -> host:port of its /metrics."""

    def log(self, process: str) -> str:
        return (self.folder / f"{process}.log").read_text(errors="replace")


def _clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("LORALINE_") or k == "LORALINE_REQUIRE_SERVERS"}


def _start(deployment: Deployment, name: str, module: str, settings: dict[str, str]) -> None:
    log = (deployment.folder / f"{name}.log").open("wb")
    deployment.processes[name] = subprocess.Popen(
        [sys.executable, "-m", module], env={**_clean_environment(), **settings}, stdout=log, stderr=subprocess.STDOUT
    )
    log.close()


def _wait_alive(deployment: Deployment, name: str, address: str) -> None:
    from loraline.core.config import CoreSettings
    from loraline.core.serving.healthcheck import check

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert deployment.processes[name].poll() is None, deployment.log(name)
        if check("loraline.api.job.v1.JobService", CoreSettings(listen=address)) == "SERVING":
            return
        time.sleep(0.2)
    raise AssertionError(f"{name} did not come up in {START_SECONDS} s:\n{deployment.log(name)}")


def _stop(deployment: Deployment) -> None:
    for process in deployment.processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for name, process in deployment.processes.items():
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{name} did not stop within 60 s of SIGTERM:\n{deployment.log(name)}") from None


# Small engine settings, so that two engines fit beside everything else on a small machine.
ENGINE = {
    "LORALINE_INFERENCE_ENGINE": "vllm",
    "LORALINE_INFERENCE_KV_CACHE_GIB": "1",
    "LORALINE_INFERENCE_MAX_MODEL_LEN": "1024",
}


def _language_model(http: str, **key: str) -> dict[str, str]:
    """The platform's own models as the endpoint that datagen asks."""
    return {"LLM_BASE_URL": f"http://{http}/v1", **key}


@contextmanager
def all_in_one(folder: Path) -> Iterator[Deployment]:
    data, address, http = folder / "data", f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    settings = {
        "LORALINE_DATA_DIR": str(data),
        "LORALINE_LISTEN": address,
        "LORALINE_METRICS_LISTEN": f"127.0.0.1:{free_port()}",
        "LORALINE_INFERENCE_HTTP_LISTEN": http,
        **_language_model(http, LLM_API_KEY_FILE=str(data / "client.key")),
        **ENGINE,
    }
    deployment = Deployment("all-in-one", {"LORALINE_ADDRESS": address}, f"http://{http}", "", folder)
    try:
        _start(deployment, "allinone", "loraline.allinone", settings)
        _wait_alive(deployment, "allinone", address)
        deployment.key = (data / "client.key").read_text().strip()
        deployment.environment |= {"LORALINE_API_KEY": deployment.key, "LORALINE_DATA_DIR": str(folder / "client")}
        yield deployment
    finally:
        _stop(deployment)


@contextmanager
def four_services(folder: Path, more: Mapping[str, str] | None = None) -> Iterator[Deployment]:
    """Run the four stages; `more` are settings of them all."""
    from loraline.core.serving.auth import KeyRing
    from loraline.core.testing.servers import postgres_server, s3_server

    with ExitStack() as servers:
        s3 = servers.enter_context(s3_server())
        database = servers.enter_context(postgres_server())
        keys = folder / "api_keys.json"
        key = KeyRing(keys).create("test", ["operate"])
        http = f"127.0.0.1:{free_port()}"
        addresses = {stage: f"127.0.0.1:{free_port()}" for stage in STAGES}
        deployment = Deployment("four services", {}, f"http://{http}", key, folder)
        deployment.environment = {
            **{f"LORALINE_{stage.upper()}_ADDRESS": address for stage, address in addresses.items()},
            "LORALINE_API_KEY": key,
            "LORALINE_DATA_DIR": str(folder / "client"),
        }
        shared = {
            "LORALINE_DATABASE_URL": database.url,
            "LORALINE_STORE_URL": "s3://loraline/artifacts",
            "LORALINE_S3_ENDPOINT": s3.endpoint,
            "LORALINE_S3_ACCESS_KEY": s3.access_key,
            "LORALINE_S3_SECRET_KEY": s3.secret_key,
            "LORALINE_KEYS_FILE": str(keys),
            "LORALINE_INFERENCE_HTTP_LISTEN": http,
            **_language_model(http, LLM_API_KEY=key),
            **ENGINE,
            **(more or {}),
        }
        try:
            for stage, address in addresses.items():
                deployment.metrics[stage] = f"127.0.0.1:{free_port()}"
                own = {
                    "LORALINE_DATA_DIR": str(folder / stage),
                    "LORALINE_LISTEN": address,
                    "LORALINE_METRICS_LISTEN": deployment.metrics[stage],
                }
                _start(deployment, stage, f"loraline.{stage}", shared | own)
            for stage, address in addresses.items():
                _wait_alive(deployment, stage, address)
            yield deployment
        finally:
            _stop(deployment)


DEPLOYMENTS = {"all-in-one": all_in_one, "four-services": four_services}
