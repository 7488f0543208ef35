"""Rows: from a file to a batch.

sources.py    raw rows of a file, a folder or a named data set
messages.py   a raw row, in whichever form, as a chat
rendering.py  a chat as the base's template writes it, its tokens, and which of them are learned
rows.py       rows chosen, mixed and brought to one form
preparing.py  tokenised rows with their ends, none longer than it may be
packing.py    several rows in one
batches.py    which rows a step takes, for any number of processes
"""

from guilomo_train.data.rows import load_rows, search_rows

__all__ = ["load_rows", "search_rows"]
