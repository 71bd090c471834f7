"""TLS, mutual TLS, and the HTTP sides: a stage's app behind the keys, and /metrics."""

import asyncio
import datetime
import ssl

import grpc
import grpc.aio
import pytest

from loraline.api.inference.v1 import inference_pb2, inference_pb2_grpc
from loraline.api.job.v1 import job_pb2, job_pb2_grpc
from loraline.core.errors import LoralineError
from loraline.core.serving.auth import KeyRing, current_principal
from loraline.core.serving.http_auth import HttpKeyAuth

httpx = pytest.importorskip("httpx")


def make_certificates(folder):
    """Write a CA, a server certificate for 127.0.0.1 and a client certificate; return their paths by name."""
    x509 = pytest.importorskip("cryptography.x509")
    import ipaddress

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    paths = {}

    def make(name, issuer=None):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer[0].subject if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
                ),
                critical=False,
            )
        )
        certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
        paths[name] = folder / f"{name}.pem"
        paths[name].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[f"{name}_key"] = folder / f"{name}.key"
        paths[f"{name}_key"].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, key

    authority = make("ca")
    make("server", authority)
    make("client", authority)
    make("stranger")
    return paths


async def lists_jobs(running, credentials):
    async with grpc.aio.secure_channel(running.addresses.grpc, credentials) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)
        return await stub.ListJobs(job_pb2.ListJobsRequest(), metadata=running.metadata(), timeout=5)


async def test_tls_by_settings(server, tmp_path):
    files = make_certificates(tmp_path)
    async with server(tls_cert=files["server"], tls_key=files["server_key"]) as running:
        await lists_jobs(running, grpc.ssl_channel_credentials(files["ca"].read_bytes()))
        with pytest.raises(grpc.aio.AioRpcError):
            await lists_jobs(running, grpc.ssl_channel_credentials(files["stranger"].read_bytes()))
        async with grpc.aio.insecure_channel(running.addresses.grpc) as plain:
            with pytest.raises(grpc.aio.AioRpcError):
                await job_pb2_grpc.JobServiceStub(plain).ListJobs(job_pb2.ListJobsRequest(), timeout=2)


async def test_mutual_tls_asks_for_a_certificate_and_a_key(server, tmp_path, failure_of):
    files = make_certificates(tmp_path)
    settings = {"tls_cert": files["server"], "tls_key": files["server_key"], "tls_client_ca": files["ca"]}
    async with server(**settings) as running:
        root = files["ca"].read_bytes()
        own = grpc.ssl_channel_credentials(root, files["client_key"].read_bytes(), files["client"].read_bytes())
        await lists_jobs(running, own)
        stranger = grpc.ssl_channel_credentials(
            root, files["stranger_key"].read_bytes(), files["stranger"].read_bytes()
        )
        for wrong in (grpc.ssl_channel_credentials(root), stranger):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await lists_jobs(running, wrong)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.secure_channel(running.addresses.grpc, own) as channel:
            keyless = await failure_of(job_pb2_grpc.JobServiceStub(channel).ListJobs(job_pb2.ListJobsRequest()))
            assert keyless.reason == "MISSING_KEY"


@pytest.mark.parametrize("broken", ["missing", "not the pair", "not pem", "client ca missing"])
async def test_certificates_that_do_not_work_are_refused_at_the_start(server, tmp_path, broken):
    files = make_certificates(tmp_path)
    settings = {"tls_cert": files["server"], "tls_key": files["server_key"]}
    if broken == "missing":
        settings["tls_cert"] = tmp_path / "nowhere.pem"
    elif broken == "not the pair":
        settings["tls_key"] = files["client_key"]
    elif broken == "not pem":
        files["server"].write_text("hello")
    else:
        settings["tls_client_ca"] = tmp_path / "nowhere.pem"
    with pytest.raises(LoralineError) as refused:
        async with server(**settings):
            pass
    assert refused.value.reason == "TLS_FILE_UNREADABLE"


async def app(scope, receive, send):
    """Answer with the caller's name."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    principal = current_principal()
    body = (principal.name if principal else "nobody").encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def test_a_stage_app_is_served_behind_the_keys(server):
    async with server(http_app=app) as running, httpx.AsyncClient() as client:
        base = f"http://{running.addresses.http['inference']}"
        assert (await client.get(f"{base}/health")).status_code == 200
        for headers in ({}, {"Authorization": "Bearer lora_x_y"}, {"Authorization": "Basic abc"}):
            refused = await client.get(f"{base}/v1/models", headers=headers)
            assert refused.status_code == 401
            error = refused.json()["error"]
            assert error["type"] == "authentication_error" and error["code"] in ("missing_key", "unknown_key")
            assert refused.headers["www-authenticate"] == "Bearer"
        for headers in ({"Authorization": f"Bearer {running.key}"}, {"x-api-key": running.key}):
            answer = await client.get(f"{base}/v1/models", headers=headers)
            assert (answer.status_code, answer.text) == (200, "first")


async def test_a_stage_app_is_served_with_tls(server, tmp_path):
    files = make_certificates(tmp_path)
    context = ssl.create_default_context(cafile=str(files["ca"]))
    pair = {"tls_cert": files["server"], "tls_key": files["server_key"]}
    async with server(http_app=app, **pair) as running, httpx.AsyncClient(verify=context) as client:
        answer = await client.get(f"https://{running.addresses.http['inference']}/health")
        assert answer.status_code == 200


async def test_operate_paths_refuse_chat_keys(tmp_path):
    ring = KeyRing(tmp_path / "keys.json")
    chat, operate = ring.create("c", ["chat"]), ring.create("o", ["operate"])
    transport = httpx.ASGITransport(HttpKeyAuth(app, ring))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        denied = await client.get("/admin/load", headers={"x-api-key": chat})
        assert denied.status_code == 403 and denied.json()["error"]["type"] == "permission_error"
        assert (await client.get("/admin/load", headers={"x-api-key": operate})).status_code == 200
        assert (await client.get("/v1/models", headers={"x-api-key": chat})).text == "c"


async def test_refusals_over_http_are_counted_by_stage_and_reason(server, series):
    async with server(http_app=app) as running, httpx.AsyncClient() as client:
        found = f"http://{running.addresses.metrics}/metrics"
        name = 'loraline_http_key_refusals_total{part="inference",reason="%s"}'
        assert f"{name % 'UNKNOWN_KEY'} 0.0" in (await client.get(found)).text
        base = f"http://{running.addresses.http['inference']}"
        chat = running.new_key("chat")
        for key, path, status in (
            ("", "/v1/models", 401), ("no", "/v1/models", 401), ("no", "/v1/models", 401), (chat, "/admin/load", 403),
            (chat, "/v1/models", 200),
        ):  # fmt: skip
            headers = {"authorization": f"Bearer {key}"} if key else {}
            assert (await client.get(f"{base}{path}", headers=headers)).status_code == status
        lines = (await client.get(found)).text.splitlines()
        for reason, count in (("MISSING_KEY", 1), ("UNKNOWN_KEY", 2), ("ROLE_MISSING", 1)):
            assert f"{name % reason} {count}.0" in lines


async def test_without_a_ring_everyone_is_let_through():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(HttpKeyAuth(app, None)), base_url="http://t") as client:
        assert (await client.get("/v1/models")).text == "anonymous"


async def test_metrics_have_the_names_that_dashboards_read(server, series):
    async with server() as running, grpc.aio.insecure_channel(running.addresses.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await stub.Generate(inference_pb2.GenerateRequest(prompt="x"), metadata=running.metadata())
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(inference_pb2.GenerateRequest(), metadata=running.metadata())
        await asyncio.sleep(0.05)
        async with httpx.AsyncClient() as client:
            base = f"http://{running.addresses.metrics}"
            answer = await client.get(f"{base}/metrics")
            assert answer.headers["content-type"].startswith("text/plain")
            # OpenMetrics would rename vLLM's own metrics, whose names hold a colon: it is never given.
            asked = await client.get(f"{base}/metrics", headers={"accept": "application/openmetrics-text"})
            assert asked.headers["content-type"].startswith("text/plain")
            assert (await client.get(f"{base}/other")).status_code == 404
            assert (await client.post(f"{base}/metrics")).status_code == 405
        text = answer.text
    labels = 'grpc_method="Generate",grpc_service="loraline.api.inference.v1.InferenceService",grpc_type="unary"'
    assert f"grpc_server_started_total{{{labels}}} 2.0" in text
    assert f"grpc_server_msg_received_total{{{labels}}} 2.0" in text
    assert f"grpc_server_msg_sent_total{{{labels}}} 1.0" in text
    assert f'grpc_server_handled_total{{grpc_code="OK",{labels}}} 1.0' in text
    assert f'grpc_server_handled_total{{grpc_code="InvalidArgument",{labels}}} 1.0' in text
    assert f"grpc_server_handling_seconds_count{{{labels}}} 2.0" in text
    assert series(text, "process_resident_memory_bytes")
    for name in ("loraline_artifact_bytes_total", "loraline_artifact_verification_failures_total"):
        assert series(text, name), name


async def test_a_stranger_on_the_metrics_port_does_no_harm(server):
    async with server() as running:
        host, _, port = running.addresses.metrics.rpartition(":")
        for bytes_sent in (
            b"\x16\x03\x01\x00\xff nonsense\r\n\r\n",
            b"GET\r\n\r\n",
            b"x" * 40000,
            b"GET / HTTP/1.1\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(bytes_sent)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 5)
            writer.close()
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://{running.addresses.metrics}/healthz")).status_code == 200
