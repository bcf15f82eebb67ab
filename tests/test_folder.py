"""The run folder: one job at a time, whole files, and a clear word when the disk or the place will not do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from medcot import folder
from medcot.errors import OutputError
from medcot.records import Run

Usage = namedtuple("Usage", "total used free")


def test_a_run_without_out_goes_to_runs_and_latest_points_at_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = folder.create_run("mine", None)
    assert first.folder.parent == Path("runs") and first.folder.name.startswith("mine-")
    assert Path("runs/latest").resolve() == first.folder.resolve()
    second = folder.create_run("mine", None)  # within the same second
    assert second.folder != first.folder
    assert Path("runs/latest").resolve() == second.folder.resolve()
    assert all(part.is_dir() for part in (second.data, second.samples, second.checkpoints))


def test_latest_is_left_alone_when_out_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder.create_run("mine", tmp_path / "here" / "deep")
    assert (tmp_path / "here" / "deep" / "samples").is_dir() and not Path("runs").exists()


def test_something_else_named_latest_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/latest").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot be made a link"):
        folder.create_run("mine", None)
    assert Path("runs/latest").is_dir() and not Path("runs/latest").is_symlink()


@pytest.mark.parametrize(("file", "said"), [("run.json", "a run"), ("notes.txt", "files")])
def test_a_folder_that_holds_something_is_refused(tmp_path, file, said):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text("{}")
    with pytest.raises(OutputError, match=f"already holds {said}") as caught:
        folder.create_run("mine", tmp_path / "out")
    assert "--resume" in caught.value.remedy and f"'{tmp_path / 'out-2'}'" in caught.value.remedy
    assert os.listdir(tmp_path / "out") == [file]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="no folder but a file"):
        folder.create_run("mine", tmp_path / "out")
    with pytest.raises(OutputError, match="cannot be made: Not a directory"):
        folder.create_run("mine", tmp_path / "out" / "below")


def test_an_empty_folder_is_accepted(tmp_path):
    assert folder.create_run("mine", tmp_path).folder == tmp_path


def test_resuming_finds_latest_and_keeps_the_name_it_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = folder.create_run("mine", None)
    run.recipe.write_text("")
    assert folder.find_resumable(None).folder == run.folder.resolve()


@pytest.mark.parametrize("out", [None, Path("nowhere")])
def test_resuming_nothing_is_refused(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"holds no recipe\.yaml"):
        folder.find_resumable(out)


# Locks ----------------------------------------------------------------------------------------------------------------


def test_the_folder_can_be_taken_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), folder.held(Run(tmp_path)):
        raise ZeroDivisionError
    with folder.held(Run(tmp_path)):
        pass


def test_a_folder_held_by_this_process_is_refused(tmp_path):
    with (
        folder.held(Run(tmp_path)),
        pytest.raises(OutputError, match="in use by another job"),
        folder.held(Run(tmp_path)),
    ):
        pytest.fail("a folder in use was taken")


def test_a_folder_held_by_another_process_is_refused_until_it_is_killed(tmp_path):
    code = (
        "import sys, filelock as f; lock = f.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / folder.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="in use by another job"), folder.held(Run(tmp_path)):
            pytest.fail("a folder in use was taken")
        child.kill()
    with folder.held(Run(tmp_path)):
        pass


# Disk -----------------------------------------------------------------------------------------------------------------


def test_too_little_disk_is_refused_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: Usage(2**40, 0, 3 * 2**30))
    folder.check_disk(tmp_path, 2 * 2**30)
    with pytest.raises(OutputError, match=r"has 3\.0 GiB free, and this run may need 5\.2 GiB"):
        folder.check_disk(tmp_path, 5 * 2**30)


# Files ----------------------------------------------------------------------------------------------------------------


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    folder.write_json(path, {"a": 1})

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.write_json(path, {"a": "half"})
    assert json.loads(path.read_text()) == {"a": 1}


def test_lines_are_read_back_and_one_cut_short_is_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    values = [{"text": "é\n\u2028 one line"}, {"n": 2}]
    folder.write_lines(path, values)
    assert folder.read_lines(path) == values
    with path.open("a") as file:
        file.write('{"n": 3')
    assert folder.read_lines(path) == values
