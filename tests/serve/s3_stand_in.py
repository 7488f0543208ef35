"""S3 for tests: moto's server in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from moto.server import ThreadedMotoServer


@dataclass
class S3StandIn:
    """A storage that can be stopped and started again.

    Attributes:
        client: boto3's.
        environment: what a server needs to ask it.
    """

    moto: ThreadedMotoServer
    client: Any
    environment: dict[str, str]


@contextmanager
def s3(*buckets: str) -> Iterator[S3StandIn]:
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        moto._port = port  # where it will be again once it was stopped
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            region_name="us-east-1",
            aws_access_key_id="any",
            aws_secret_access_key="any",
        )
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
        }
        yield S3StandIn(moto, client, environment)
    finally:
        moto.stop()
