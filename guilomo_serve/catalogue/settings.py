"""What `guilomo-serve` tells its server process, and which names adapters may have."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from guilomo_serve.adapter import AdapterError
from guilomo_serve.catalogue.remote import Address, is_address

ADMIN_KEY = "GUILOMO_ADMIN_KEY"
_SETTINGS = "GUILOMO_SERVE"
_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"  # vLLM's, of what its Ray workers get
# In URLs, logs and folders as they are; "@" parts a name from its version. No part is hidden or
# leads upwards.
_PART = "[A-Za-z0-9][A-Za-z0-9._:-]*"
NAME = f"{_PART}(/{_PART})*"
NAME_LENGTH = 128
# What /v1/adapters/NAME/... does; a name that ends so would have the URL of another's.
_ACTIONS = ("load", "pin", "rollback", "unpin")


@dataclass(frozen=True)
class Admission:
    """How much clients may ask; of replicas, one for all.

    Attributes:
        max_concurrency: requests that each adapter may have at once; None: any number.
        max_concurrency_of: adapter -> the same for it alone.
        max_body: bytes of a request's body, for inference.
    """

    max_concurrency: int | None = None
    max_concurrency_of: Mapping[str, int] = field(default_factory=dict)
    max_body: int = 32 * 2**20

    def __str__(self) -> str:
        """As JSON, in which equal ones are equal."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> Admission:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Settings:
    """How adapters are administered.

    Attributes:
        roots: folders that adapters may be taken from; without any root, every folder on the
            machine.
        remote_roots: addresses below which adapters may be taken from; nothing else remote may.
        state: folder of the catalogue; None for one that is gone when the server ends.
        shared: address of the database whose catalogue replicas share; None for one of our own.
        files: of the shared catalogue: a folder that all replicas see, or an address in S3.
        evict_idle: seconds without a request after which a name's weights are freed; None: never.
        memory: bytes that the weights of loaded adapters may take; None: no bound.
        check_adapters: compare each adapter's products with the formula as it is loaded.
        admission: how much clients may ask.
        list_models: names of adapters that /v1/models lists at most; 0: those in memory.
        admin_key: what an administrator has to present.
        made_key: whether the server made that key itself, and leaves it in a file.
        expert_load: "on" to sample how routers share tokens out, "modules" to have each expert in
            /metrics too, or "off".
    """

    admin_key: str = field(repr=False)
    shared: str | None = field(default=None, repr=False)  # it may have a password in it
    files: Path | Address | None = None
    roots: tuple[Path, ...] = ()
    state: Path | None = None
    evict_idle: float | None = None
    memory: int | None = None
    check_adapters: bool = False
    admission: Admission = field(default_factory=Admission)
    made_key: bool = False
    list_models: int = 1000
    remote_roots: tuple[Address, ...] = ()
    expert_load: str = "on"

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Leaves the settings for `from_environment` in this process and its children."""
        environment[_SETTINGS] = json.dumps(
            {
                "roots": [str(root) for root in self.roots],
                "remote_roots": [str(root) for root in self.remote_roots],
                "state": str(self.state) if self.state else None,
                "shared": self.shared,
                "files": str(self.files) if self.files else None,
                "evict_idle": self.evict_idle,
                "memory": self.memory,
                "check_adapters": self.check_adapters,
                "expert_load": self.expert_load,
                "admission": str(self.admission),
                "made_key": self.made_key,
                "list_models": self.list_models,
            }
        )
        environment[ADMIN_KEY] = self.admin_key
        environment[_RAY_COPIES] = f"{environment.get(_RAY_COPIES, '')},GUILOMO_"

    @classmethod
    def from_environment(cls) -> Settings | None:
        """The settings of this server; None where `guilomo-serve` did not start it."""
        if _SETTINGS not in os.environ:
            return None
        value = json.loads(os.environ[_SETTINGS])
        return cls(
            roots=tuple(Path(root) for root in value["roots"]),
            state=Path(value["state"]) if value["state"] else None,
            shared=value["shared"],
            files=_place(value["files"]) if value["files"] else None,
            evict_idle=value["evict_idle"],
            memory=value["memory"],
            check_adapters=value["check_adapters"],
            admission=Admission.parse(value["admission"]),
            admin_key=os.environ[ADMIN_KEY],
            made_key=value["made_key"],
            list_models=value["list_models"],
            remote_roots=tuple(Address.parse(root) for root in value["remote_roots"]),
            expert_load=value["expert_load"],
        )


def _place(text: str) -> Path | Address:
    return Address.parse(text) if is_address(text) else Path(text)


def check_name(name: str) -> None:
    """Refuses a name that an adapter cannot have.

    Raises:
        AdapterError: it has other characters than the allowed ones, or too many.
    """
    if len(name) > NAME_LENGTH or not re.fullmatch(NAME, name):
        raise AdapterError(
            f"the name {name[:140]!a} cannot be served: expected 1 to {NAME_LENGTH} letters, "
            'digits and ._:- of ASCII, in parts parted by "/" that begin with a letter or digit'
        )
    if "/" in name and name.rpartition("/")[2] in _ACTIONS:
        raise AdapterError(f"the name {name!a} cannot be served: its last part is a route's")
