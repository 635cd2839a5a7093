import json
import os
import time
from dataclasses import replace

import pytest

from simulations.compare.workers import FAILURE, Outcome, Task, Workers, is_finished
from simulations.settings import settings_hash

RUN = "tests.simulations.compare.fakes:run"
SHARING = (("bug", "dear"), ("", "dear"), ("", ""), ("", "dear"), ("", ""), ("", "dear"))


def task(folder, wish="", *, rank=4, seed=0):
    settings = {"tracker": {"wish": wish}, "peft": {"rank": rank}, "rounds": 2, "seed": seed}
    name = f"{wish or 'fine'}{rank}-{seed}"
    return Task(name, settings, folder / name, settings_hash(settings))


def outcomes(tasks, *, jobs=1, run=RUN, **more):
    with Workers(jobs=jobs, threads=3, run=run, **more) as workers:
        return {outcome.task.name: outcome for outcome in workers.outcomes(tasks) if outcome is not None}


def test_failures_and_deaths_are_told_and_the_others_go_on(tmp_path):
    wishes = ["", "bug", "exit", "die", "killed", ""]
    tasks = [task(tmp_path, wish, seed=at) for at, wish in enumerate(wishes)]
    ended = outcomes(tasks)
    found = [ended[each.name] for each in tasks]
    assert [each.status for each in found] == ["finished", *["failed"] * 4, "finished"]
    assert found[1].reason == "ZeroDivisionError"
    assert found[2].reason == "SystemExit: 3"
    assert found[3].reason == "the worker process ended with exit code 7; last said: a child speaks"
    assert "killed by SIGKILL" in found[4].reason
    assert all(is_finished(each) == (outcome.status == "finished") for each, outcome in zip(tasks, found, strict=True))
    assert json.loads((tasks[3].folder / FAILURE).read_text())["kind"] == "died"
    log = (tasks[1].folder / "log.txt").read_text()
    assert "a child speaks" in log
    assert "Traceback" in log


def test_tasks_that_share_wait_for_one_another_and_all_end(tmp_path):
    tasks = [replace(task(tmp_path, wish, seed=at), shares=shares) for at, (wish, shares) in enumerate(SHARING)]
    with Workers(jobs=3, threads=1, run=RUN) as workers:
        ended = [outcome for outcome in workers.outcomes(tasks) if outcome is not None]
    assert sorted(outcome.status for outcome in ended) == ["failed", *["finished"] * 5]
    dear = [outcome.status for outcome in ended if outcome.task.shares]
    assert dear == ["failed", "finished", "finished", "finished"], "the first works on it alone, then the next"


def test_a_task_that_must_wait_is_passed_by(tmp_path):
    workers = Workers(jobs=2, threads=1, run=RUN)
    tasks = [replace(task(tmp_path, seed=at), shares=shares) for at, shares in enumerate(("x", "x", "", "y"))]
    workers._todo += tasks
    assert [workers._next() for _ in range(3)] == [tasks[0], tasks[2], tasks[3]]
    workers._ended(Outcome(tasks[0], "failed"))
    assert workers._next() == tasks[1]
    workers._ended(Outcome(tasks[1], "finished"))
    assert workers._next() is None
    workers._todo += tasks[:2]
    assert [workers._next(), workers._next()] == tasks[:2], "once it is made, all may use it at once"


def test_a_worker_runs_many_cells_and_its_threads_are_limited(tmp_path):
    tasks = [task(tmp_path, seed=seed) for seed in range(4)]
    outcomes(tasks, jobs=2)
    summaries = [json.loads((each.folder / "summary.json").read_text()) for each in tasks]
    assert len({summary["process"] for summary in summaries}) <= 2
    assert {summary["threads"] for summary in summaries} == {"3"}


def test_errors_of_ours_are_told_in_their_three_parts(tmp_path):
    (found,) = outcomes([task(tmp_path)], run="tests.simulations.compare.fakes:raises_ours").values()
    assert (found.status, found.reason) == ("failed", "asked; found; remedy")


def test_a_run_that_cannot_be_imported_is_a_failure(tmp_path):
    (found,) = outcomes([task(tmp_path)], run="tests.simulations.compare.fakes:nothing").values()
    assert found.status == "failed"
    assert "AttributeError" in found.reason


def test_what_an_earlier_attempt_left_is_removed(tmp_path):
    each = task(tmp_path)
    each.folder.mkdir()
    (each.folder / "metrics.jsonl").write_text("torn")
    (each.folder / FAILURE).write_text("{}")
    assert outcomes([each])[each.name].status == "finished"
    assert not (each.folder / FAILURE).exists()
    assert len((each.folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_folder_that_cannot_be_used_is_a_failure(tmp_path):
    each = task(tmp_path)
    each.folder.write_text("a file")
    assert outcomes([each])[each.name].status == "failed"


def test_an_interruption_lets_cells_write_what_there_is(tmp_path):
    slow, waiting = task(tmp_path, "slow"), task(tmp_path)

    def stop_when_begun():
        with Workers(jobs=1, threads=1, run=RUN) as workers:
            for outcome in workers.outcomes([slow, waiting]):
                assert outcome is None
                if (slow.folder / "begun").exists():
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_when_begun()
    assert json.loads((slow.folder / "summary.json").read_text())["status"] == "interrupted"
    assert not waiting.folder.exists()
    assert not is_finished(slow)


def test_a_deaf_cell_is_killed(tmp_path):
    each = task(tmp_path)
    begin = time.monotonic()

    def stop():
        with Workers(jobs=1, threads=1, run="tests.simulations.compare.fakes:deaf", grace_seconds=0.3) as workers:
            for _ in workers.outcomes([each]):
                if (each.folder / "pid").exists():
                    raise TimeoutError

    with pytest.raises(TimeoutError):
        stop()
    pid = int((each.folder / "pid").read_text())
    while time.monotonic() < begin + 30 and _alive(pid):
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("change", [{"status": "interrupted"}, {"config_hash": "other"}, {"status": None}])
def test_only_a_finished_run_of_equal_settings_is_finished(tmp_path, change):
    each = task(tmp_path)
    each.folder.mkdir()
    summary = {"status": "finished", "config_hash": each.hash}
    path = each.folder / "summary.json"
    path.write_text(json.dumps(summary))
    assert is_finished(each)
    path.write_text(json.dumps(summary | change))
    assert not is_finished(each)
    path.write_text("torn")
    assert not is_finished(each)
    path.unlink()
    assert not is_finished(each)
