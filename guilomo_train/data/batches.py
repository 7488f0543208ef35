"""Which rows a step takes: the same for any number of processes and accumulated parts.

A pass over the rows is one order of them, drawn from the seed and the number of the pass. It is
cut into the batches that all processes take together; of each batch, process p of P takes the
rows p, p + P, p + 2P, ... So 1 x 8 rows, 2 processes x 4 and 2 parts x 4 are the same steps, and a
resumed run finds its place without any state but the step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class Batches(Sampler[list[int]]):
    """This process's rows of each batch of a pass.

    Args:
        rows: how many rows there are.
        batch_size: rows of a process at once.
        seed: of the order.
        processes, process: how many there are, and which one this is.
        lengths: tokens of each row, to bring rows of similar length together; None for any order.
        parts: batches whose gradients are added up to one step; lengths are alike in a step.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        processes: int,
        process: int,
        lengths: list[int] | None = None,
        parts: int = 1,
    ) -> None:
        self.rows = rows
        self.batch = batch_size * processes
        self.seed = seed
        self.processes = processes
        self.process = process
        self.lengths = lengths
        self.parts = parts
        self.epoch = 0
        self._drawn: tuple[int, list[list[int]]] = (-1, [])  # the pass that `at` is in

    def set_epoch(self, epoch: int) -> None:
        """Says which pass comes next; transformers' trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        """Row indices, batch by batch.

        A last batch with fewer rows than processes gives some of them the row `blank` alone.
        """
        return iter(self._pass(self.epoch))

    @property
    def blank(self) -> int:
        """Index of the row without labels that `with_blank` appends."""
        return self.rows

    def at(self, number: int) -> list[int]:
        """Row indices of the batch that is taken after `number` others, over all passes."""
        epoch, position = divmod(number, len(self))
        if self._drawn[0] != epoch:
            self._drawn = (epoch, self._pass(epoch))
        return self._drawn[1][position]

    def _pass(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator()
        generator.manual_seed(random.Random(f"{self.seed} {epoch}").getrandbits(63))
        if self.lengths is None:
            order = torch.randperm(self.rows, generator=generator).tolist()
        else:
            order = get_length_grouped_indices(
                self.lengths, self.batch * self.parts, generator=generator
            )
        batches = [order[i : i + self.batch] for i in range(0, self.rows, self.batch)]
        return [batch[self.process :: self.processes] or [self.blank] for batch in batches]


class BatchLoader(DataLoader):
    """A loader of `Batches`, which it tells the number of the pass."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def with_blank(rows: Dataset) -> Dataset:
    """Rows of `input_ids` and `labels`, and after them one that nothing is learnt from.

    It has no labels: its NLL is 0, and the load-balance loss leaves rows without labels out.
    """
    first: dict[str, Any] = rows[0]
    token = first["input_ids"][0]
    blank = {"input_ids": [token, token], "labels": [-100, -100]}
    if "seq_lengths" in rows.column_names:  # of packed rows
        blank["seq_lengths"] = [2]
    return concatenate_datasets([rows, Dataset.from_list([blank], features=rows.features)])
