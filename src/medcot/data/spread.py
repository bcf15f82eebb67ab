"""The same checks on more than one machine: the map half on Ray Data, the reduce half where it always is.

``scan`` only needs somebody who turns tasks into tallies. Here that is a pool of Ray actors, each holding the checks
once, to whom Ray Data hands the tasks: some kilobytes each, since a task names its rows and does not hold them. The
tallies come back to the machine that asked, go to its cache, and are reduced there, in the same order, so findings are
equal by construction. What is read by range (JSON Lines, and the scratch file of any other source) must therefore lie
on a file system that all machines share, under the same path.

Not used: ``Dataset.groupby().aggregate()``. The reducers are no sums; they read tallies in order, on disk, and ask for
rows again.

Needs the extra ``ray``. The cluster is the caller's: call ``ray.init(address=…)`` before; without, Ray starts one on
this machine. Source: https://docs.ray.io/en/latest/data/api/doc/ray.data.Dataset.map.html.
"""

from __future__ import annotations

import pickle
from collections.abc import Generator, Iterator
from typing import Any

from medcot.data.children import Raised
from medcot.data.scan import Done, Mapper, Task, Workers
from medcot.errors import MedcotError, MissingExtraError


def map_on_ray(num_workers: int) -> Workers:
    """Return workers that are actors of the Ray cluster, for ``scan(workers=…)``.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    try:
        import ray.data
        from ray.exceptions import RayError
    except ImportError as error:
        raise MissingExtraError(
            "Ray is not installed", "It spreads the checks over several machines", "Run: pip install 'medcot[ray]'"
        ) from error

    def run(mapper: Mapper, tasks: Iterator[Task]) -> Generator[Done, None, None]:
        packed = [{"task": pickle.dumps(task)} for task in tasks]
        if not packed:
            return
        actor: Any = _Actor  # Ray's own types know functions only
        dataset = ray.data.from_items(packed, override_num_blocks=len(packed)).map(
            actor, fn_constructor_args=(pickle.dumps(mapper),), compute=ray.data.ActorPoolStrategy(size=num_workers)
        )
        try:
            for row in dataset.iter_rows():
                answer = pickle.loads(row["answer"])
                if isinstance(answer, Raised):
                    raise answer.error
                yield answer
        except RayError as error:
            raise ChildProcessError(f"A worker on Ray failed:\n{error}") from error

    return run


class _Actor:
    """One worker: unpickles the checks when it starts, and then answers tasks."""

    def __init__(self, mapper: bytes) -> None:
        self._mapper: Mapper = pickle.loads(mapper)

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        answer: Done | Raised
        try:
            answer = self._mapper(pickle.loads(row["task"]))
        except MedcotError as error:
            answer = Raised(error)
        return {"answer": pickle.dumps(answer)}
