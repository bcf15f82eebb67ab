"""Several processes on one job, one a GPU, as ``torchrun`` and ``accelerate launch`` start them.

The first process (rank 0) does the job: it draws, writes the run folder, asks and evaluates. The others hold the same
model and help to train it; between start and training they wait, however long the first one asks questions. Waiting
and messages go over a gloo group of their own with a timeout of a month, since NCCL's watchdog ends a process whose
collective takes ten minutes, and a ring of GPUs need not spin meanwhile. When any process fails, the launcher ends the
rest.

The launcher's words are environment variables (https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables);
this is the only file that reads them. Without them everything here is one process and torch.distributed stays unused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from medcot.errors import MedcotError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=30)


class RankError(MedcotError, ConnectionError):
    """Another process of this job has ended."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those of its job."""

    rank: int = 0
    size: int = 1
    messages: Any = None  # the gloo group that messages go over; None for one process

    @property
    def is_first(self) -> bool:
        """Whether this is the process that draws, writes and asks."""
        return self.rank == 0


_ALONE = Ranks()
_current = _ALONE


def current() -> Ranks:
    """Return this process's place; alone outside of ``joined``."""
    return _current


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes that a launcher started with this one, until ``part``; alone if there are none.

    Raises:
        ModelError: more processes on this machine than GPUs.
    """
    global _current
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or _current is not _ALONE:
        yield _current
        return
    import torch
    from torch import distributed

    local_rank = int(os.environ["LOCAL_RANK"])
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ModelError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes were started on a machine with"
                f" {torch.cuda.device_count()} GPUs",
                "Each process computes on a GPU of its own",
                f"Start {torch.cuda.device_count()}: torchrun --nproc-per-node {torch.cuda.device_count()} ...",
            )
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if on_cuda else None
    distributed.init_process_group("nccl" if on_cuda else "gloo", device_id=device)
    _current = Ranks(distributed.get_rank(), size, distributed.new_group(backend="gloo", timeout=PATIENCE))
    # Not in a finally: taking NCCL down needs all processes, and after an error the others are busy elsewhere. This
    # one's end is what tells the launcher to end them.
    yield _current
    part()


def part() -> None:
    """Leave the other processes, at the same point in all of them; from here on each is alone."""
    global _current
    if _current.size > 1:
        from torch import distributed

        wait()
        distributed.destroy_process_group()
        _current = _ALONE


def share(value: Any) -> Any:
    """Return the first process's value in every process; the others wait for it.

    Raises:
        RankError: the first process has ended.
    """
    if _current.size == 1:
        return value
    from torch import distributed

    box = [value]
    try:
        distributed.broadcast_object_list(box, src=0, group=_current.messages)
    except RuntimeError as error:
        raise RankError(
            f"process {_current.rank} lost the first one: {str(error).splitlines()[0]}",
            "The processes of a job end together",
            "See what the first process said",
        ) from None
    return box[0]


def wait() -> None:
    """Wait until every process is here."""
    if _current.size > 1:
        from torch import distributed

        distributed.barrier(group=_current.messages)


def add_up(numbers: Sequence[int]) -> list[int]:
    """Return the sums of each process's numbers over all processes."""
    if _current.size == 1:
        return list(numbers)
    import torch
    from torch import distributed

    sums = torch.tensor(numbers, dtype=torch.int64)
    distributed.all_reduce(sums, group=_current.messages)
    return [int(number) for number in sums]


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each parameter's gradient by the sum over all processes; one that is missing counts as zero.

    One flat buffer makes it one collective: 42 million float32 values of a rank-16 adapter on 8B are 168 MB.
    """
    if _current.size == 1:
        return
    import torch
    from torch import distributed

    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    distributed.all_reduce(flat)
    for parameter, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = summed.view_as(parameter).to(parameter.dtype)


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if _current.size == 1:
        return
    import torch
    from torch import distributed

    flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
    distributed.broadcast(flat, src=0)
    for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(values.view_as(tensor))
