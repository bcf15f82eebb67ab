"""On Ray the checks find what they find on one machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from medcot.data.pieces import SourcePieces
from medcot.data.scan import Scanned, scan
from medcot.data.sources import stream_rows
from medcot.errors import DataError, MissingExtraError
from toy_checks import Numbered, ToyBuilder


def run(path: Path, scratch: Path, workers: object, **options: object) -> Scanned:
    pieces = SourcePieces(stream_rows(str(path)), scratch, rows_per_piece=10)
    return scan(pieces, ToyBuilder(), [Numbered(**options)], workers=workers)  # type: ignore[arg-type]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from medcot.data.spread import map_on_ray

    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medcot\[ray\]'"):
        map_on_ray(2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two cores on this machine."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        paths = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}  # of the toys
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            runtime_env=paths,
        )
        yield
        ray.shutdown()


@pytest.mark.slow
def test_two_workers_on_ray_find_the_same(cluster: None, tmp_path: Path) -> None:
    from medcot.data.spread import map_on_ray

    lines = "".join(f'{{"q": "question {n}{" needle" if n % 9 == 0 else ""}"}}\n' for n in range(1, 96))
    for name, text in (("rows.jsonl", lines + '{"q": null}\n'), ("rows.csv", "q\n" + lines.replace('"', "'"))):
        (tmp_path / name).write_text(text)
        trace = tmp_path / f"{name}.trace"
        alone = run(tmp_path / name, tmp_path, 1)
        spread = run(tmp_path / name, tmp_path, map_on_ray(2), trace=trace, nap_s=0.2)
        assert alone.findings[0].count == 10 and spread.findings == alone.findings
        for figure in ("num_rows", "num_examples", "counts", "num_chunks", "num_tallies", "num_mapped"):
            assert getattr(spread.figures, figure) == getattr(alone.figures, figure)
        assert len({line.split()[2] for line in trace.read_text().splitlines()}) == 2  # both took part


@pytest.mark.slow
def test_trouble_on_ray_reaches_the_parent(cluster: None, tmp_path: Path) -> None:
    from medcot.data.spread import map_on_ray

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"q": "{"trouble" if n == 33 else "fine"}"}}\n' for n in range(1, 58)))
    with pytest.raises(DataError, match=r"The row says trouble\. It must not\. Mend it\."):
        run(path, tmp_path, map_on_ray(2), fail="data")
    with pytest.raises(ChildProcessError, match="a bug in the check"):
        run(path, tmp_path, map_on_ray(2), fail="bug")
