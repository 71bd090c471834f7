"""The one server of the platform: what every stage's `__main__` and the all-in-one server run."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import grpc.aio
import pydantic
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraline.core import logging as platform_logging
from loraline.core import tracing
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.folder_lock import sole_user
from loraline.core.serving.addresses import (
    ServerAddresses,
    bind,
    bound_address,
    join_address,
    split_address,
)
from loraline.core.serving.banner import start_message
from loraline.core.serving.component import Component, ComponentBuilder, Platform
from loraline.core.serving.grpc_metrics import GrpcMetrics
from loraline.core.serving.health import HealthMonitor, HealthServicer
from loraline.core.serving.housekeeping import keep_house
from loraline.core.serving.http import AppServer, MetricsServer
from loraline.core.serving.http_auth import HttpKeyAuth
from loraline.core.serving.interceptor import PlatformInterceptor
from loraline.core.serving.key_refusals import KeyRefusals
from loraline.core.serving.machine import DiskMetrics, GpuMetrics, ReadinessMetrics
from loraline.core.serving.opening import make_runners, open_platform, platform_services
from loraline.core.serving.startup import channel_options, check_settings, open_keys, server_credentials

__all__ = ["ServerAddresses", "open_platform", "run", "serve"]

_TELL_SECONDS = 0.1
"""Time for those who watch the health to hear of NOT_SERVING before their streams end."""
log = structlog.get_logger("loraline.server")


async def serve(
    settings: CoreSettings,
    builders: Sequence[ComponentBuilder],
    *,
    platform: Platform | None = None,
    ready: Callable[[ServerAddresses], None] | None = None,
    stop: asyncio.Event | None = None,
    first_key: Callable[[str], None] | None = None,
) -> None:
    """Serve the stages until SIGTERM or SIGINT, or until `stop` is set; then drain and return.

    `ready` is called once with the real addresses when calls are accepted. `first_key` is called with the plain key
    that the first start makes; without it the key is only in data_dir/client.key. A second signal ends without grace.
    Errors before that point are LoralineErrors that name the setting to change.
    """
    opened = platform or await asyncio.to_thread(open_platform, settings)
    try:
        components = [build(opened) for build in builders]
        # Several processes may share a Postgres; a folder with the database in it belongs to one.
        names = [c.name for c in components]
        with sole_user(settings.data_dir, names if opened.database.is_sqlite else []), tracing.recording(names):
            await PlatformServer(opened, components, first_key).serve(ready, stop or asyncio.Event())
    finally:
        if platform is None:
            opened.database.close()


class PlatformServer:
    """One run of a server: its parts, started in order and stopped in the reverse."""

    def __init__(self, platform: Platform, components: Sequence[Component], first_key: Callable[[str], None] | None):
        self.settings = platform.settings
        self.platform = platform
        self.components = components
        check_settings(self.settings, components)
        self._credentials = server_credentials(self.settings)
        self.ring, key = open_keys(self.settings)
        if key and first_key:
            first_key(key)
        self._metrics, self._refusals = GrpcMetrics(), KeyRefusals()
        self._machine = (
            ReadinessMetrics(lambda: self.health.reasons),
            DiskMetrics(self.settings.data_dir),
            GpuMetrics(),
        )
        self._interceptor = PlatformInterceptor(self._metrics, self.ring)
        self._health_servicer = HealthServicer()
        self._services = platform_services(platform)
        self.health = HealthMonitor(self._health_servicer, components, list(self._services), platform.database)
        self._runners = make_runners(platform, components)
        self._started: list[Component] = []
        self._apps: list[AppServer] = []
        self._metrics_server: MetricsServer | None = None
        self._housekeeping: asyncio.Task[None] | None = None
        self._grpc: grpc.aio.Server | None = None

    async def serve(self, ready: Callable[[ServerAddresses], None] | None, stop: asyncio.Event) -> None:
        """Start, wait for the wish to stop, drain."""
        collectors = (self._metrics, self._refusals, *self._machine)
        for collector in collectors:
            self.platform.registry.register(collector)
        hurry = asyncio.Event()
        restore = _on_signals(stop, hurry)
        try:
            addresses = await self._start()
            if ready is not None:
                ready(addresses)
            log.info("serving", grpc=addresses.grpc, metrics=addresses.metrics, http=addresses.http)
            await stop.wait()
            await self._drain(hurry)
        finally:
            restore()
            await self._stop()
            for collector in collectors:
                self.platform.registry.unregister(collector)

    async def _start(self) -> ServerAddresses:
        sockets = self._bind()
        try:
            self._grpc = self._make_server()
            address = self._open_port(self._grpc)
            for component in self.components:
                await component.start()
                self._started.append(component)
            await self.health.start()
            for runner in self._runners:
                await runner.start()
            await self._grpc.start()
            self._housekeeping = asyncio.create_task(keep_house(self.platform.library))
            return await self._start_http(address, sockets)
        except BaseException:
            for listener in sockets.values():
                listener.close()
            raise

    def _bind(self) -> dict[str, socket.socket]:
        """Take all HTTP ports first: a port that is taken must show before a model is loaded."""
        sockets: dict[str, socket.socket] = {}
        try:
            if self.settings.metrics_listen:
                sockets["metrics"] = bind(self.settings.metrics_listen, "LORALINE_METRICS_LISTEN")
            for component in self.components:
                if component.http_app is not None:
                    sockets[component.name] = bind(component.http_listen, _http_setting(component))
        except LoralineError:
            for listener in sockets.values():
                listener.close()
            raise
        return sockets

    def _make_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[self._interceptor], options=channel_options(self.settings))
        health_pb2_grpc.add_HealthServicer_to_server(self._health_servicer, server)
        names = dict(self._services)
        for component in self.components:
            names.update(component.services)
        for add in names.values():
            add(server)
        if self.settings.reflection:
            shown = [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(shown, server)
        return server

    def _open_port(self, server: grpc.aio.Server) -> str:
        # gRPC only says that binding failed; binding the same address ourselves first says why.
        bind(self.settings.listen, "LORALINE_LISTEN").close()
        host, _ = split_address(self.settings.listen, "LORALINE_LISTEN")
        if self._credentials is None:
            port = server.add_insecure_port(self.settings.listen)
        else:
            port = server.add_secure_port(self.settings.listen, self._credentials)
        return join_address(host, port)

    async def _start_http(self, address: str, sockets: dict[str, socket.socket]) -> ServerAddresses:
        http: dict[str, str] = {}
        for component in self.components:
            if component.http_app is not None:
                guarded = HttpKeyAuth(component.http_app, self.ring, self._refusals.of(component.name))
                app = AppServer(component.name, guarded, self.settings)
                await app.start(sockets[component.name])
                self._apps.append(app)
                http[component.name] = bound_address(
                    sockets[component.name], component.http_listen, _http_setting(component)
                )
        metrics = ""
        if "metrics" in sockets:
            self._metrics_server = MetricsServer(self.platform.registry, self.health)
            await self._metrics_server.start(sockets["metrics"])
            metrics = bound_address(sockets["metrics"], self.settings.metrics_listen, "LORALINE_METRICS_LISTEN")
        return ServerAddresses(address, metrics, http)

    async def _drain(self, hurry: asyncio.Event) -> None:
        """Stop taking calls, let jobs checkpoint and calls in flight finish, within the grace."""
        log.info("draining", grace_seconds=self.settings.stop_grace_seconds)
        await self.health.drain()
        await asyncio.sleep(_TELL_SECONDS)
        self._interceptor.end_following()
        assert self._grpc is not None  # noqa: S101 - started
        closing = asyncio.create_task(self._grpc.stop(self.settings.stop_grace_seconds + 5))
        work = asyncio.gather(
            *(runner.drain() for runner in self._runners), self._calls_finished(), *(app.stop() for app in self._apps)
        )
        waiting = asyncio.create_task(hurry.wait())
        await asyncio.wait(
            {work, waiting}, timeout=self.settings.stop_grace_seconds + 5, return_when=asyncio.FIRST_COMPLETED
        )
        waiting.cancel()
        if not work.done():
            log.warning("stopping before all work was handed back", calls=self._interceptor.in_flight())
            work.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await work
        await self._grpc.stop(None)
        await closing

    async def _calls_finished(self) -> None:
        # A look every now and then while stopping is cheaper than an event on the path of every call.
        while self._interceptor.in_flight():  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    async def _stop(self) -> None:
        """Stop whatever is still running; also the way out of a failed start and of a cancelled task."""
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        await self.health.stop()
        if self._grpc is None:
            return
        await self._grpc.stop(None)
        for app in self._apps:
            await app.stop()
        for component in reversed(self._started):
            try:
                await component.stop()
            except Exception as error:
                log.error("a stage failed while stopping", stage=component.name, exc_info=error)
        if self._metrics_server is not None:
            await self._metrics_server.stop()
        log.info("stopped")


def _http_setting(component: Component) -> str:
    return f"LORALINE_{component.name.upper()}_HTTP_LISTEN"


def _on_signals(stop: asyncio.Event, hurry: asyncio.Event) -> Callable[[], None]:
    """Let SIGTERM and SIGINT set `stop`, and `hurry` when they come again; return what takes that back."""
    loop = asyncio.get_running_loop()
    installed: list[int] = []

    def asked() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        # Only the main thread may; a server in another thread is stopped by its event.
        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, asked)
            installed.append(number)

    def restore() -> None:
        for number in installed:
            loop.remove_signal_handler(number)

    return restore


def run(builders: Sequence[ComponentBuilder]) -> None:
    """Serve the stages with the settings of the environment; ends the process with 1 and one line when that fails."""
    platform_logging.configure()
    try:
        settings = CoreSettings()
        platform_logging.configure(settings.log_format, settings.log_level)
        notes: list[str] = []

        def ready(addresses: ServerAddresses) -> None:
            print(start_message(settings, addresses, notes, terminal=sys.stdout.isatty()), flush=True)

        asyncio.run(serve(settings, builders, ready=ready, first_key=notes.append))
    except LoralineError as error:
        sys.exit(_complaint(error.message, error))
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        sys.exit(
            _complaint(f"the settings are wrong: {problems}. They come from LORALINE_… in the environment.", error)
        )


def _complaint(text: str, error: Exception) -> str:
    structlog.get_logger("loraline.server").debug("start failed", exc_info=error)
    return f"loraline: {platform_logging.mask(text)}"
