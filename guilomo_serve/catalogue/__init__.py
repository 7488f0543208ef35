"""Which adapters a server has, over swaps and restarts.

    settings.py   what `guilomo-serve` tells its server process
    store.py      the adapters' files, copied and named by their digest
    database.py   names, their versions and what is pinned, in SQLite
    command.py    `guilomo-serve adapters ls|put|rm|rollback`

A name points to its current version and remembers the one before; a version is a number, a digest
and what the adapter is. Loading and swapping in the engine is guilomo_serve/server/managed.py.
"""

from guilomo_serve.catalogue.database import Catalogue, CatalogueError, Entry, Version
from guilomo_serve.catalogue.settings import Settings, check_name
from guilomo_serve.catalogue.store import Forbidden, Missing, Store, digest_of

__all__ = [
    "Catalogue",
    "CatalogueError",
    "Entry",
    "Forbidden",
    "Missing",
    "Settings",
    "Store",
    "Version",
    "check_name",
    "digest_of",
]
