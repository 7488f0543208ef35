"""Where replicas keep adapters' files, asked of both: a folder and S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guilomo_serve.adapter import WEIGHTS_FILE, AdapterError
from guilomo_serve.catalogue import Store, Unavailable, digest_of
from guilomo_serve.catalogue.remote import Address
from guilomo_serve.catalogue.shared_files import SharedFiles, shared_files
from guilomo_serve.catalogue.store import FILES
from tests.serve.s3_stand_in import S3StandIn, s3

pytestmark = pytest.mark.slow

BUCKET, BELOW = "fleet", "team/files"


@pytest.fixture(scope="module")
def storage() -> Iterator[S3StandIn]:
    with s3(BUCKET) as found:
        yield found


@pytest.fixture
def bucket(storage, monkeypatch) -> SharedFiles:
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    return shared_files(Address.parse(f"s3://{BUCKET}/{BELOW}"))


@pytest.fixture(params=["folder", "s3"])
def files(request, tmp_path) -> SharedFiles:
    if request.param == "folder":
        return shared_files(tmp_path / "shared")
    found: SharedFiles = request.getfixturevalue("bucket")
    return found


def test_what_one_replica_leaves_another_has(files, adapters, tmp_path):
    folder, other = adapters["first"], Store(tmp_path / "other")
    digest = digest_of(folder)
    files.publish(digest, folder)
    files.publish(digest, folder)
    files.fetch_into(other, digest)
    assert digest_of(other.verify(digest)) == digest
    files.discard(digest)
    files.discard(digest)
    with pytest.raises(AdapterError, match="put the adapter again"):
        files.fetch_into(Store(tmp_path / "third"), digest)


def test_files_that_were_changed_are_refused_until_they_are_put_again(
    files, storage, adapters, tmp_path
):
    folder, other, mine = adapters["first"], adapters["second"], Store(tmp_path / "mine")
    digest, of_other = digest_of(folder), digest_of(other)
    mine.add(other, lambda copy: None)
    files.publish(digest, folder)
    for name in FILES:
        if (shared := tmp_path / "shared" / digest).is_dir():
            (shared / name).write_bytes((other / name).read_bytes())
        else:
            key = f"{BELOW}/{digest}/{name}"
            storage.client.upload_file(str(other / name), BUCKET, key)
    with pytest.raises(AdapterError, match=rf"{digest}.*expected {digest}.*put the adapter again"):
        files.fetch_into(mine, digest)
    assert digest_of(mine.verify(of_other)) == of_other  # which it had for another name
    files.publish(digest, folder)
    files.fetch_into(mine, digest)
    assert digest_of(mine.verify(digest)) == digest


def test_half_of_an_adapter_in_s3_is_none(bucket, storage, adapters, tmp_path):
    digest = digest_of(adapters["first"])
    bucket.publish(digest, adapters["first"])
    storage.client.delete_object(Bucket=BUCKET, Key=f"{BELOW}/{digest}/{WEIGHTS_FILE}")
    store = Store(tmp_path / "store")
    with pytest.raises(AdapterError, match=WEIGHTS_FILE):
        bucket.fetch_into(store, digest)
    bucket.publish(digest, adapters["first"])
    bucket.fetch_into(store, digest)


def test_s3_that_refuses_or_is_down_is_said_to_be_so(bucket, storage, adapters, tmp_path):
    digest = digest_of(adapters["first"])
    nowhere = shared_files(Address.parse("s3://no-such-bucket"))
    with pytest.raises(Unavailable, match=r"s3://no-such-bucket/.*NoSuchBucket"):
        nowhere.publish(digest, adapters["first"])
    storage.moto.stop()
    try:
        with pytest.raises(Unavailable, match=f"s3://{BUCKET}/{BELOW}/{digest}: .*does not answer"):
            bucket.publish(digest, adapters["first"])
        with pytest.raises(Unavailable):
            bucket.fetch_into(Store(tmp_path / "store"), digest)
        bucket.discard(digest)  # who is done with a version is not told that it is left over
    finally:
        storage.moto.start()


def test_places_that_cannot_be_are_refused(tmp_path: Path, capsys, monkeypatch):
    from guilomo_serve import cli

    monkeypatch.setenv("GUILOMO_ADMIN_KEY", "the-key-of-all-replicas")
    for place, why in (
        ("hf://acme", "--state-files hf://acme: expected a folder or s3://BUCKET[/PREFIX]"),
        ("s3://x", "--state-files: no address of an adapter"),
        ("s3://bucket/a@b+c", "--state-files s3://bucket/a@b+c: a root has no revision"),
    ):
        flags = ("--state", "postgresql://127.0.0.1:1/guilomo", "--state-files", place)
        assert cli.main(["/no/such/model", *flags]) == 2
        assert why in capsys.readouterr().err
