"""`make demo`: starts the all-in-one server on free ports, runs the demo against it, and stops it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from loraline.core.config import CoreSettings
from loraline.core.serving.addresses import free_port
from loraline.core.serving.healthcheck import check

START_SECONDS = 90
STOP_SECONDS = 90
ALIVE = "loraline.api.job.v1.JobService"


def _wait_alive(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while check(ALIVE, CoreSettings(listen=address)) != "SERVING":
        if server.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"The server did not start:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.2)


def main() -> int:
    """Return the demo's exit code: 0 when every piece of evidence holds."""
    settings = CoreSettings()
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    address, log = f"127.0.0.1:{free_port()}", settings.data_dir / "demo-server.log"
    environment = {
        **os.environ,
        "LORALINE_DATA_DIR": str(settings.data_dir),
        "LORALINE_LISTEN": address,
        "LORALINE_INFERENCE_HTTP_LISTEN": f"127.0.0.1:{free_port()}",
        "LORALINE_METRICS_LISTEN": f"127.0.0.1:{free_port()}",
        "LORALINE_ADDRESS": address,
    }
    print(f"Starting Loraline in one process (its log: {log}) …", flush=True)
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "loraline.allinone"], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _wait_alive(server, address, log)
        return subprocess.run([sys.executable, "-m", "loraline.client.demo"], env=environment, check=False).returncode
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept; `make demo` goes on from there.", flush=True)
        return 130
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()


if __name__ == "__main__":
    sys.exit(main())
