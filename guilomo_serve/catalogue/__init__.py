"""Which adapters a server has, over swaps and restarts.

    settings.py   what `guilomo-serve` tells its server process
    keys.py       the key of administration, and where a server leaves it
    sources.py    where adapters may be taken from, and how remote ones get here
    remote.py     addresses of adapters elsewhere, and what a storage has to offer
    hub.py, s3.py the Hugging Face Hub and S3 as such storages
    store.py      the adapters' files, copied and named by their digest
    sql.py        names, their versions and what is pinned: what every catalogue is asked
    database.py   the catalogue of one server, in SQLite
    postgres.py   the catalogue that replicas share, in PostgreSQL
    replicas.py   what replicas say to one another there
    shared_files.py  where they keep adapters' files: a folder that all see, or S3
    command.py    `guilomo-serve adapters ls|put|rm|rollback`

A name points to its current version and remembers the one before; a version is a number, a digest
and what the adapter is. Loading and swapping in the engine is guilomo_serve/server/versions.py.
"""

from guilomo_serve.catalogue.database import Catalogue
from guilomo_serve.catalogue.remote import Unavailable
from guilomo_serve.catalogue.settings import Settings, check_name
from guilomo_serve.catalogue.sources import Source, Sources
from guilomo_serve.catalogue.sql import CatalogueError, Entry, Listed, Version
from guilomo_serve.catalogue.store import Forbidden, Missing, Store, digest_of

__all__ = [
    "Catalogue",
    "CatalogueError",
    "Entry",
    "Forbidden",
    "Listed",
    "Missing",
    "Settings",
    "Source",
    "Sources",
    "Store",
    "Unavailable",
    "Version",
    "check_name",
    "digest_of",
]
