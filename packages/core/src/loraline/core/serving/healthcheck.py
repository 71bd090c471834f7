"""`python -m loraline.core.serving.healthcheck [SERVICE]`: exit 0 when the server of this container is SERVING.

The health check of images and compose files: asks the standard gRPC health service at the address that the server's own
settings name. Without SERVICE it asks for the server as a whole.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraline.core.config import CoreSettings


def check(service: str, settings: CoreSettings, timeout_seconds: float = 3.0) -> str:
    """Return the health status' name, such as `SERVING`, or the gRPC error's."""
    host, _, port = settings.listen.rpartition(":")
    target = f"{'127.0.0.1' if host in ('', '0.0.0.0', '[::]') else host}:{port}"  # noqa: S104 - compared, not bound
    if settings.tls_cert:
        root = settings.tls_cert.read_bytes()
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(root))
    else:
        channel = grpc.insecure_channel(target)
    with channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds)
        except grpc.RpcError as error:
            return str(error.code().name)  # type: ignore[attr-defined]
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def main() -> int:
    """Print the status and return the exit code."""
    status = check(sys.argv[1] if len(sys.argv) > 1 else "", CoreSettings())
    print(status)
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
