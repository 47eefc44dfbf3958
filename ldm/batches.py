"""Work in batches: one that does not fit into memory is halved and done again."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from ldm.errors import ResourceError, is_out_of_memory

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def in_batches(
    items: Sequence[Any],
    batch_size: int,
    work: Callable[[Sequence[Any], int, int], Iterable[Result]],
    *,
    refusal: Callable[[int], str],
    may_halve: bool = True,
) -> Iterator[Result]:
    """Yield what `work` yields for one batch of items after the other, halving those that do not fit into memory.

    Args:
        items: are sliced: a batch of a range is a range.
        work: is called with (batch, how many were finished before it, how many there are as far as is known). A batch
            that is halved is begun anew, so that what an item becomes must not depend on its neighbours.
        refusal: the error for a batch of this size that did not fit and cannot be halved.
        may_halve: False where items do depend on their neighbours.

    Raises:
        ResourceError: out of memory with a single item, or where halving is forbidden.
    """
    pending = deque(items[i : i + batch_size] for i in range(0, len(items), batch_size))
    done = 0
    while pending:
        batch = pending.popleft()
        try:
            yield from work(batch, done, done + 1 + len(pending))
            done += 1
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1 or not may_halve:
                raise ResourceError(refusal(len(batch))) from None
        # Outside the except block, so that the failed batch's tensors are free by now.
        half = (len(batch) + 1) // 2
        log.warning("out of memory with %d images at once; trying %d", len(batch), half)
        pending.extendleft([batch[half:], batch[:half]])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
