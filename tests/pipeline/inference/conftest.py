"""An object store."""

import os
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from datasets import remote


@pytest.fixture
def bucket(monkeypatch) -> Iterator[fs.S3FileSystem]:
    """A local server with an empty bucket, "bucket", that s3:// URIs mean."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    remote._s3.cache_clear()
    s3 = fs.S3FileSystem(
        endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True
    )
    s3.create_dir("bucket")
    yield s3
    s3.delete_dir_contents("bucket")  # servers of one process share it
    remote._s3.cache_clear()
    server.stop()
