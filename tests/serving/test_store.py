"""The store: rows, queue, expiry, and many processes at once."""

import json
import multiprocessing
import os
import sqlite3
import time

import pytest
from serving_jobs import add, job_of, send, settings_of, work

from vfengine.serving.jobs import THUMBNAIL, JobSettings, new_id
from vfengine.serving.store import MAX_ATTEMPTS, MAX_OUTAGES, QueueFull, Store

ME = "engine-1"


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "jobs")
    yield store
    store.close()


def ids(jobs):
    return [job.id for job in jobs]


def test_a_job_is_kept_as_it_was(store, tmp_path):
    settings = settings_of(prompt="a person walking", look={"label": "walk"}, extends="")
    job = job_of(settings, remixed_from="video_00")
    store.add(job, max_queue=1)
    store.close()
    again = Store(tmp_path / "jobs")
    assert again.get(job.id) == job
    assert again.get(new_id()) is None
    assert JobSettings.from_json(settings.to_json()) == settings
    again.close()


def test_a_full_queue(store):
    waiting = add(store, settings_of(), settings_of())
    with pytest.raises(QueueFull):
        store.add(job_of(), max_queue=2)
    assert store.count("queued") == 2
    store.claim(ME)  # who is made no longer waits
    store.add(job_of(), max_queue=2)
    assert [store.ahead(name) for name in waiting] == [0, 0]


def test_a_request_twice_is_one_job(store):
    first = store.add(job_of(), max_queue=1, request_key="user:1")
    again = store.add(job_of(), max_queue=1, request_key="user:1")  # though the queue is full
    assert again.id == first.id and store.count("queued") == 1
    assert store.add(job_of(), max_queue=2, request_key="user:2").id != first.id
    store.delete(first.id)
    assert store.add(job_of(), max_queue=2, request_key="user:1").id != first.id


def test_pages_of_jobs(store):
    names = add(store, *[settings_of(base_seed=seed) for seed in range(5)])
    page, more = store.list(limit=2)
    assert ids(page) == names[:-3:-1] and more
    page, more = store.list(after=names[3], limit=3)
    assert ids(page) == [names[2], names[1], names[0]] and not more
    page, more = store.list(after=names[0], limit=3, order="asc")
    assert ids(page) == names[1:4] and more
    with pytest.raises(KeyError):
        store.list(after=new_id())


def test_batches_are_of_one_shape(store):
    kinds = [settings_of(), settings_of(num_frames=8), settings_of(residual_seed=9)]
    kinds += [settings_of(prompt="x"), settings_of(picture=True), settings_of(extends="")]
    one, two, three, four, five, six = add(store, *kinds)
    assert [store.ahead(name) for name in (one, six)] == [0, 5]
    assert ids(store.claim(ME, 2)) == [one, three]
    assert ids(store.claim(ME, 9)) == [two]
    assert ids(store.claim(ME, 9)) == [four]
    assert ids(store.claim(ME, 9)) == [five, six]
    assert store.claim(ME, 9) == []
    job = store.get(one)
    assert (job.status, job.attempts) == ("in_progress", 1) and job.started_at


def test_only_its_worker_touches_a_job(store):
    (name,) = add(store, settings_of())
    assert not store.report(name, ME, "base", 10)  # it waits
    store.claim(ME)
    assert store.report(name, ME, "base", 10, has_base=True)
    assert store.report(name, ME, "residual", 5)  # progress never goes back
    job = store.get(name)
    assert (job.phase, job.progress, job.has_base) == ("residual", 10, True)
    store.recover()
    store.claim("engine-2")
    folder = store.folder_of(name)
    folder.mkdir()
    assert not store.holds(name, ME) and store.holds(name, "engine-2")
    assert not store.report(name, ME, "base", 50)
    assert not store.finish(name, ME, {}, None)
    assert not store.fail(name, ME, "code", "message", None)
    store.requeue([name], ME)
    job = store.get(name)
    assert (job.status, job.attempts, job.progress) == ("in_progress", 2, 0)
    assert folder.is_dir()  # which is the other's now
    assert store.finish(name, "engine-2", {"bytes": 1}, 12.0)
    job = store.get(name)
    assert (job.status, job.progress, job.result, job.phase) == ("completed", 100, {"bytes": 1}, "")
    assert job.expires_at == 12.0 and job.completed_at


def test_a_job_that_is_given_back_is_not_blamed(store):
    (name,) = add(store, settings_of())
    for _ in range(2 * MAX_ATTEMPTS):
        store.claim(ME)
        store.requeue([name], ME)
    job = store.get(name)
    assert (job.status, job.attempts, job.started_at) == ("queued", 0, None)


def test_a_job_that_engines_die_of(store):
    bad, good, late = add(store, *[settings_of(base_seed=seed) for seed in range(3)])
    assert ids(store.claim(ME, 2)) == [bad, good]
    assert store.recover([ME]) == []  # it lives
    assert sorted(store.recover(["another"])) == sorted([bad, good])
    assert ids(store.claim(ME, 9)) == [bad]  # alone: either may be what it died of
    assert ids(store.claim("engine-2", 9)) == [good]
    for _ in range(MAX_ATTEMPTS - 2):
        assert store.recover(["engine-2"]) == [bad]
        assert ids(store.claim(ME)) == [bad]
    before = time.time()
    assert store.recover(["engine-2"], keep=60) == [bad]
    job = store.get(bad)
    assert job.status == "failed" and job.error["code"] == "engine_died"
    assert job.expires_at >= before + 60
    assert store.get(good).status == "in_progress"
    assert ids(store.claim(ME)) == [late]


def test_jobs_of_another_model_have_failed(store):
    jobs = [job_of(model=name) for name in ("tiny", "old", "old", "old")]
    old, claimed = [store.add(job, 9).id for job in jobs][1], jobs[0].id
    assert [job.id for job in store.claim("a", 2)] == [claimed, old]
    store.finish(old, "a", {}, None)
    assert store.refuse_other_models("tiny", keep=60.0) == 2
    assert [store.get(job.id).status for job in jobs] == ["in_progress", "completed"] + 2 * [
        "failed"
    ]
    job = store.get(jobs[3].id)
    assert job.error["code"] == "model_not_served" and "than tiny" in job.error["message"]
    assert job.expires_at == pytest.approx(job.completed_at + 60.0)


def test_the_end_of_a_server_is_not_its_jobs_fault(store):
    (name,) = add(store, settings_of())
    for _ in range(MAX_OUTAGES - 1):
        store.claim(ME)
        assert store.recover(keep=60, outage=True) == [name]
        assert (store.get(name).status, store.get(name).attempts) == ("queued", 0)
    store.claim(ME)
    store.recover(keep=60, outage=True)  # unless it never ends well
    assert store.get(name).error["code"] == "engine_died"


def test_what_has_expired_goes(store):
    old, young, running, waiting = add(store, *[settings_of(base_seed=k) for k in range(4)])
    for name in (old, young, running):
        store.claim(ME)
        store.folder_of(name).mkdir()
    now = time.time()
    store.finish(old, ME, {}, now - 1)
    store.finish(young, ME, {}, now + 60)
    store.base_paths.mkdir()
    used, unused = (store.base_paths / f"{name}.safetensors" for name in ("used", "unused"))
    for file in (used, unused):
        file.touch()
    os.utime(unused, (now - 4000, now - 4000))
    (store.base_paths / ".being-written.part").mkdir()
    assert store.expire(now, unused_paths=3600) == 1
    assert store.get(old) is None and not store.folder_of(old).exists()
    assert all(store.get(name) for name in (young, running, waiting))
    assert [file.exists() for file in (used, unused)] == [True, False]


def test_folders_without_a_job_go_after_an_hour_by_no_clock_on_the_wall(store, monkeypatch):
    rubbish, upload = store.folder_of(new_id()), store.folder_of(new_id())
    rubbish.mkdir()
    began = time.monotonic()
    store.expire(time.time(), unused_paths=3600)
    upload.mkdir()
    for seconds, there in ((3500, [True, True]), (3700, [False, True]), (7400, [False, False])):
        monkeypatch.setattr(time, "monotonic", lambda: began + seconds)  # noqa: B023
        store.expire(time.time() + 1e9, unused_paths=3600)  # a clock that was set forward
        assert [place.exists() for place in (rubbish, upload)] == there


def test_deleted_files_do_not_come_back(store):
    (name,) = add(store, settings_of())
    store.claim(ME)
    assert store.delete(name) and not store.delete(name)
    file = store.file(name, THUMBNAIL)
    file.parent.mkdir()  # by an engine that has not noticed
    file.touch()
    assert not store.finish(name, ME, {}, None)
    assert not file.parent.exists()


def test_names_that_are_no_ids(store):
    for name in ("", "..", "video_../x", "video_" + "0" * 80, "job_00", "video_00/upload"):
        with pytest.raises(ValueError, match="the id of a video"):
            store.folder_of(name)


def test_a_store_of_another_version(store, tmp_path):
    store.close()
    db = sqlite3.connect(tmp_path / "jobs" / "jobs.sqlite3")
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(ValueError, match=r"another version \(9\)"):
        Store(tmp_path / "jobs")


def test_one_server_at_a_time(store, tmp_path):
    store.hold()
    store.hold()
    other = Store(tmp_path / "jobs")
    with pytest.raises(ValueError, match="another server uses this folder"):
        other.hold()
    add(other, settings_of())  # an engine, or one who sends a job, may use it
    store.let_go()
    other.hold()
    other.close()
    store.hold()


def test_a_write_that_fails_leaves_the_store_usable(store):
    with pytest.raises(sqlite3.IntegrityError):
        job = job_of()
        store.add(job, max_queue=9)
        store.add(job, max_queue=9)
    assert store.count("queued") == 1
    add(store, settings_of())


# -- many processes --------------------------------------------------------------------------------


def test_many_processes_at_once(tmp_path):
    """Senders and engines open a store that is not there yet; each job is made by one engine."""
    context = multiprocessing.get_context("spawn")
    count, folder, sent = 20, tmp_path / "jobs", context.Event()
    outs = [tmp_path / f"{k}.json" for k in range(3)]
    senders = [context.Process(target=send, args=(folder, count)) for _ in outs]
    engines = [
        context.Process(target=work, args=(folder, f"engine-{k}", out, sent))
        for k, out in enumerate(outs)
    ]
    for process in senders + engines:
        process.start()
    for process in senders:
        process.join()
    sent.set()
    for process in engines:
        process.join()
    assert [process.exitcode for process in senders + engines] == [0] * 6
    total = len(senders) * count
    made = [name for out in outs for name in json.loads(out.read_text())]
    store = Store(folder)
    assert len(made) == len(set(made)) == store.count("completed") == total
    jobs, _ = store.list(limit=total)
    assert all(job.attempts == 1 and job.progress == 100 for job in jobs)
    assert store._rows("PRAGMA integrity_check")[0][0] == "ok"
