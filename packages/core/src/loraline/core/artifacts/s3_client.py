"""The S3 client: how it is opened, and what its failures mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import certifi
import grpc
import urllib3
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error
from urllib3.util import Retry, Timeout

from loraline.core.config import CoreSettings
from loraline.core.errors import (
    LoralineError,
    failed_precondition,
    invalid_argument,
    resource_exhausted,
    unavailable,
)

CONCURRENCY = 4
"""Parts that are on their way at the same time."""

_REMEDY = "Check LORALINE_S3_ENDPOINT, LORALINE_S3_ACCESS_KEY, LORALINE_S3_SECRET_KEY and LORALINE_STORE_URL."
_WHO = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "AuthorizationHeaderMalformed"}
_FULL = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "EntityTooLarge"}
_GONE = {"NoSuchKey", "NoSuchVersion", "NoSuchUpload", "NotFound"}


def open_client(settings: CoreSettings, connections: int = 2 * CONCURRENCY) -> Minio:
    """Return a client for these settings; it connects at its first call. INVALID_ARGUMENT for unusable settings."""
    secret = settings.s3_secret_key.get_secret_value()
    if settings.s3_secret_key_file is not None:
        secret = _read_secret(settings.s3_secret_key_file)
    if bool(settings.s3_access_key) != bool(secret):
        message = f"The S3 store needs both an access key and a secret key, or neither. {_REMEDY}"
        raise invalid_argument("STORE_SETTINGS_INVALID", message, s3_secret_key=message)
    http = urllib3.PoolManager(
        maxsize=connections,
        timeout=Timeout(connect=5, read=120),
        # Every request here may be sent twice: parts and ranges carry their own numbers.
        retries=Retry(total=4, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504], allowed_methods=None),
        cert_reqs="CERT_REQUIRED",
        ca_certs=certifi.where() if settings.s3_secure else None,
    )
    try:
        return Minio(
            settings.s3_endpoint,
            access_key=settings.s3_access_key or None,
            secret_key=secret or None,
            region=settings.s3_region,
            secure=settings.s3_secure,
            http_client=http,
        )
    except ValueError as error:
        message = f"{settings.s3_endpoint!r} is no S3 endpoint: {error}. Write host:port."
        raise invalid_argument("STORE_SETTINGS_INVALID", message, s3_endpoint=message) from error


def _read_secret(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        message = f"The secret key file {path} can't be read: {error.strerror}."
        raise invalid_argument("STORE_SETTINGS_INVALID", message, s3_secret_key_file=message) from error


def ensure_bucket(client: Minio, bucket: str, region: str) -> None:
    """Create the bucket when it is missing; others may do so at the same time."""
    if client.bucket_exists(bucket):
        return
    try:
        client.make_bucket(bucket, location=region)
    except MinioException as error:
        if _said(error)[0] not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
            raise


def is_missing(error: MinioException) -> bool:
    """Tell whether the server said that an object or an unfinished upload is not there."""
    return _said(error)[0] in _GONE


def _said(error: MinioException) -> tuple[str, str]:
    """Return the S3 error code and message, empty when the answer has none.

    The client reads errors sent as application/xml only; rclone and others send text/xml, which is S3 all the same.
    """
    if isinstance(error, S3Error):
        return error.code or "unknown", error.message or ""
    if isinstance(error, InvalidResponseError):
        found = [re.search(f"<{tag}>([^<]*)</{tag}>", str(error)) for tag in ("Code", "Message")]
        return found[0][1] if found[0] else "", found[1][1] if found[1] else ""
    return "", ""


@contextmanager
def s3_errors(where: str) -> Iterator[None]:
    """Turn the client's failures into typed errors that name the place and the remedy."""
    try:
        yield
    except urllib3.exceptions.HTTPError as error:
        reason = getattr(error, "reason", None) or error
        message = f"The S3 server of {where} is out of reach: {_cause(reason)}. {_REMEDY}"
        raise unavailable("STORE_UNREACHABLE", message, location=where) from error
    except MinioException as error:
        code, text = _said(error)
        if code:
            raise _of_server(code, text, where) from error
        message = f"What answers for {where} does not speak S3: {str(error)[:200]}. {_REMEDY}"
        raise unavailable("STORE_UNREACHABLE", message, location=where) from error


def _cause(error: object) -> str:
    # urllib3 begins its messages with the repr of a connection object, which tells people nothing.
    return str(error).rsplit(">: ", maxsplit=1)[-1][:200]


def _of_server(code: str, text: str, where: str) -> LoralineError:
    said = f"{code}: {text}" if text and text != code else code
    if code in _WHO:
        message = f"The S3 server of {where} does not accept the keys ({said}). {_REMEDY}"
        return LoralineError(grpc.StatusCode.UNAUTHENTICATED, "STORE_ACCESS_DENIED", message)
    if code in {"AccessDenied", "AllAccessDisabled", "AccountProblem"}:
        message = f"The keys give no right to use {where} ({said}). Grant read, write, list and delete. {_REMEDY}"
        return LoralineError(grpc.StatusCode.PERMISSION_DENIED, "STORE_ACCESS_DENIED", message)
    if code in _FULL:
        return resource_exhausted("DISK_FULL", f"The S3 server of {where} has no room left ({said}).", folder=where)
    if code == "NoSuchBucket":
        return failed_precondition("STORE_BUCKET_MISSING", f"The bucket of {where} was deleted. {_REMEDY}")
    return unavailable("STORE_FAILED", f"The S3 server of {where} failed ({said}). Try again.", location=where)
