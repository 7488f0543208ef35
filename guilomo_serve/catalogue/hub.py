"""Adapters on the Hugging Face Hub, over huggingface_hub.

Its own downloads bound neither size nor time, and keep a cache of their own; so its API says which
commit a revision is and how large the files are, and its session reads them. Token, endpoint,
proxies and offline mode are huggingface_hub's (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from guilomo_serve.adapter import AdapterError
from guilomo_serve.catalogue.remote import (
    ANSWER_S,
    Address,
    Busy,
    Denied,
    Found,
    Unavailable,
    seconds_of,
)
from guilomo_serve.catalogue.store import FILES, Forbidden, Missing


class Hub:
    """The Hub as a `Storage`."""

    def look(self, address: Address) -> Found:
        if len(address.parts) < 2:
            raise Missing(f"{address}: names no repository")
        repository = "/".join(address.parts[:2])
        with _errors(address):
            info = HfApi().model_info(
                repository, revision=address.revision, expand=["sha"], timeout=ANSWER_S
            )
        if info.id != repository:  # renamed, perhaps by another owner, and redirected
            raise Forbidden(f"{address}: the Hub has it as {str(info.id)[:200]!a}; ask for that")
        if info.sha is None:
            raise Unavailable(address, "the Hub does not say which commit it is")
        sizes: dict[str, int] = {}
        for name in FILES:
            url = _url(address, info.sha, name)
            try:
                with _errors(address):
                    size = get_hf_file_metadata(url, timeout=ANSWER_S).size
            except Missing:
                if not sizes:
                    raise
                raise AdapterError(f"{address}: the file {name} is missing") from None
            if size is None:
                raise Unavailable(address, f"the Hub does not say how large {name} is")
            sizes[name] = size
        return Found(info.sha, sizes)

    def read(self, address: Address, name: str) -> Generator[bytes, None, None]:
        assert address.revision is not None
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        url = _url(address, address.revision, name)
        with (
            _errors(address),
            get_session().stream("GET", url, headers=headers, timeout=ANSWER_S) as answer,
        ):
            hf_raise_for_status(answer)
            yield from answer.iter_bytes()


def _url(address: Address, commit: str, name: str) -> str:
    repository, folder = "/".join(address.parts[:2]), "/".join(address.parts[2:])
    return hf_hub_url(repository, name, subfolder=folder or None, revision=commit)


@contextmanager
def _errors(address: Address) -> Iterator[None]:
    """Says in our words what went wrong; messages of the library have URLs in them."""
    try:
        yield
    except (GatedRepoError, DisabledRepoError):
        raise Denied(address, "the Hub does not let this server read it (HF_TOKEN)") from None
    except RevisionNotFoundError:
        raise Missing(f"{address}: the repository has no such revision") from None
    except RepositoryNotFoundError:
        raise Missing(f"{address}: no such repository, or a private one (HF_TOKEN)") from None
    except (EntryNotFoundError, HFValidationError):
        raise Missing(f"{address}: no such adapter") from None
    except OfflineModeIsEnabled:
        raise Unavailable(address, "the Hub is not asked, HF_HUB_OFFLINE is set") from None
    except HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 403):
            raise Denied(address, f"the Hub denies access (HTTP {status}, HF_TOKEN)") from None
        if status == 404:
            raise Missing(f"{address}: no such adapter") from None
        reason = f"the Hub answers with HTTP {status}"
        if status == 429:
            retry_after_s = seconds_of(e.response.headers.get("Retry-After"))
            raise Busy(address, reason, retry_after_s) from None
        raise Unavailable(address, reason) from None
    except Exception as e:  # of the HTTP client, which differs between versions of the library
        raise Unavailable(address, f"the Hub does not answer ({type(e).__name__})") from None
