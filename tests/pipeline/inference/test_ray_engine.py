"""Workers of Ray: the same results as one process's, each image once, and nothing is left over."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch

from pipeline.inference import proposal_store, ray_engine
from pipeline.inference.detect import load_detector
from pipeline.inference.detect_folders import detect_images
from pipeline.inference.engines import in_this_process, open_engines
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.propose import load_proposer
from pipeline.inference.propose_folders import propose_images
from pipeline.inference.ray_engine import MESSAGE, Worker
from tests.pipeline.inference.builders import proposals_of
from tests.pipeline.inference.test_propose_folders import write_image

CPU = torch.device("cpu")
COUNT, PAUSE = 24, 0.25  # images, and seconds that each takes


@pytest.fixture(scope="module")
def cluster():
    """What makes engines of two workers, on a cluster of this module's."""
    with open_engines("ray", workers=2, address=None, device="cpu") as engines:
        yield engines


class SlowProposer:
    """One box, and the process that made it as a file in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, image: np.ndarray, *, image_id: int, file_name: str):
        (self.folder / str(os.getpid())).touch()
        time.sleep(PAUSE)
        mask = np.ones((1, *image.shape[:2]), bool)
        return proposals_of(mask, image_id=image_id, file_name=file_name)


def load_slow(folder: Path) -> tuple[SlowProposer, dict]:
    return SlowProposer(folder), {}


def run_slowly(images: str, output: str, pids: str) -> None:
    """A run of its own, with a shard for each chunk; what test processes start."""
    from pipeline.command import run_tool

    proposal_store.SHARD_SECONDS = 0

    def main() -> None:
        with open_engines("ray", workers=2, address=None, device="cpu") as engines:
            engine = engines(partial(load_slow, Path(pids)))
            propose_images(None, images, output, settings={}, engine=engine)

    run_tool(main)


@pytest.fixture
def many(tmp_path) -> Path:
    for n in range(COUNT):
        write_image(tmp_path / "many" / f"{n}.png", n)
    return tmp_path / "many"


@pytest.fixture
def pids(tmp_path) -> Path:
    (tmp_path / "pids").mkdir()
    return tmp_path / "pids"


def rows_of(store: Path) -> pa.Table:
    return ProposalStore(store).read().sort_by("image_id")


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_two_workers_fill_the_same_store(
    cluster, shapes_directory, tiny_sharpmask, tmp_path, monkeypatch, capsys
):
    images = tmp_path / "images"
    images.symlink_to(shapes_directory / "images")
    (tmp_path / "broken.jpg").write_text("no image")
    monkeypatch.chdir(tmp_path)  # paths are relative, and shall stay so in what is said
    load = partial(load_proposer, tiny_sharpmask, CPU, num_proposals=20, precision="fp32")
    proposer, settings = load()
    summaries = {}
    for name, engine in (("one", in_this_process), ("two", cluster(load))):
        sources = ["images/val", "broken.jpg"]
        summaries[name] = propose_images(
            proposer, sources, name, settings=settings, engine=engine, annotations=None
        )
    assert summaries["one"] == summaries["two"] and len(summaries["one"].broken) == 1
    assert rows_of(tmp_path / "two").equals(rows_of(tmp_path / "one"))
    assert len(rows_of(tmp_path / "two")) == summaries["two"].done > 0
    assert capsys.readouterr().out.count("skipped: ") == 2


@pytest.mark.slow
def test_a_process_may_have_clusters_one_after_another():
    code = f"from {ray_engine.__name__} import ray_cluster as cluster\n"
    code += "for _ in range(2):\n    with cluster(None, 1, on_gpus=False): print('answers')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout == "answers\n" * 2, done.stderr


@pytest.mark.slow
def test_two_workers_detect_the_same(cluster, shapes_directory, tiny_detector, tmp_path):
    store = ProposalStore(tiny_detector.parents[1] / "proposals" / "train")
    images = shapes_directory / "images" / "train"
    load = partial(load_detector, tiny_detector, CPU, precision="fp32")
    detector, settings = load()
    for name, engine in (("one", in_this_process), ("two", cluster(load))):
        detect_images(
            detector, store, images, tmp_path / name, settings=settings, draw=1, engine=engine
        )
    one, two = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")}
        for n in ("one", "two")
    )
    assert one == two and len(one) > 24


@pytest.mark.slow
def test_images_of_a_killed_worker_are_done_by_another(cluster, many, pids, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "CHUNKS", 3)  # of four images: some are done when it is killed

    def kill_one() -> None:
        wait_for(lambda: any(pids.iterdir()))
        os.kill(int(next(pids.iterdir()).name), signal.SIGKILL)

    killer = Thread(target=kill_one)
    killer.start()
    engine = cluster(partial(load_slow, pids))
    summary = propose_images(None, many, tmp_path / "out", settings={}, engine=engine)
    killer.join()
    assert summary.done == COUNT and not summary.broken
    assert rows_of(tmp_path / "out")["image_id"].to_pylist() == list(range(COUNT))
    assert len(list(pids.iterdir())) == 3  # two workers, and who came after


def load_deadly() -> tuple:
    def propose(image, *, image_id, file_name):
        if file_name == "7.png":
            os._exit(1)
        return proposals_of(np.ones((1, *image.shape[:2]), bool), image_id=image_id)

    return propose, {}


@pytest.mark.slow
def test_an_image_that_ends_every_worker_ends_the_run(cluster, many, tmp_path, monkeypatch):
    import ray

    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "execution_no_progress_timeout_s", 45)
    with pytest.raises(ValueError, match="no worker of Ray has finished anything"):
        propose_images(None, many, tmp_path / "out", settings={}, engine=cluster(load_deadly))
    assert len(rows_of(tmp_path / "out")) >= COUNT / 2, "what others have done is kept"


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_process_and_goes_on(signum, cluster, many, pids, tmp_path):
    output = tmp_path / "out"
    code = f"from {__name__} import run_slowly; run_slowly(*{[str(many), str(output), str(pids)]})"
    run = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait_for(lambda: len(list(output.glob("*.parquet"))) >= 2)
    processes = psutil.Process(run.pid).children(recursive=True)
    assert len(processes) >= 4
    if signum == signal.SIGINT:
        os.killpg(run.pid, signum)  # as Ctrl-C in a terminal
    else:
        run.send_signal(signum)
    assert run.wait(60) == (-signum if signum == signal.SIGKILL else 128 + signum)
    _, alive = psutil.wait_procs(processes, timeout=120)  # two agents take a minute
    assert not alive
    mine = [
        p
        for p in Path("/tmp").glob("maskpath-ray-*/owner")
        if p.read_text().endswith(f" {run.pid}")
    ]
    assert len(mine) == (signum == signal.SIGKILL)
    ray_engine._remove(ray_engine._make_folder())  # the next start removes what the killed one left
    assert not any(path.exists() for path in mine)

    done = len(rows_of(output))
    assert 0 < done < COUNT
    engine = cluster(partial(load_slow, pids))
    summary = propose_images(None, many, output, settings={}, engine=engine)
    assert (summary.done_before, summary.done) == (done, COUNT - done)
    assert rows_of(output)["image_id"].to_pylist() == list(range(COUNT))
    assert not [p for p in output.rglob(".*")], "no temporary file, no lock"


# Without a cluster.


def test_an_error_in_a_worker_is_what_it_says(cluster, tmp_path):
    def work(network, items, broken):
        raise ValueError("the shard is torn")
        yield

    engine = cluster(partial(load_slow, tmp_path))
    with pytest.raises(ValueError, match="^a worker cannot work: the shard is torn$"):
        list(engine(work, None, [1, 2], [], largest=1))


def test_a_worker_that_cannot_load_says_why(tmp_path):
    load = partial(load_proposer, tmp_path / "nowhere.pt", CPU)
    worker = Worker(load, lambda *_: [], torch.get_num_threads(), os.getcwd())
    answer = worker(pa.table({"items": [b""]}))
    assert "nowhere.pt" in answer[ray_engine.FAILURE][0].as_py()


def test_what_a_worker_leaves_out_comes_as_messages():
    def work(_network, items, broken):
        for item in items:
            if item % 2:
                broken.append(f"{item} is odd")
            else:
                yield pa.table({"item": [item]})

    def load():
        return None, {}

    worker = Worker(load, work, torch.get_num_threads(), os.getcwd())
    rows = worker(pa.table({"items": [ray_engine.pickle.dumps([0, 1, 2])]})).to_pylist()
    assert [row["item"] for row in rows] == [0, 2, None]
    assert [row[MESSAGE] for row in rows] == [None, None, "1 is odd"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "local", "workers": 2}, "--engine ray"),
        ({"name": "local", "address": "auto"}, "--engine ray"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"device": "cuda:1"}, "--device cuda:1"),
        ({"address": "127.0.0.1:1"}, "--address 127.0.0.1:1: no cluster answers"),
        ({"address": "ray://head:10001"}, "HOST:PORT or auto, got ray://head:10001"),
        ({"address": "head"}, "HOST:PORT or auto, got head"),
    ],
)
def test_what_does_not_go_together_is_refused(options, words):
    defaults = {"name": "ray", "workers": None, "address": None, "device": "cpu"}
    with pytest.raises(ValueError, match=words), open_engines(**defaults | options):
        pass


def test_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(ValueError, match="leave out torchrun"),
        open_engines("ray", workers=None, address=None, device="cpu"),
    ):
        pass


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ValueError, match=r'pip install "ray\[data\]"'),
        open_engines("ray", workers=None, address=None, device="cpu"),
    ):
        pass
