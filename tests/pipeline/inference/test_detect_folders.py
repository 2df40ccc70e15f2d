"""Detections in folders: what is left out is named, an interrupted run goes on."""

import itertools
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pipeline.inference.detect import load_detector
from pipeline.inference.detect_folders import detect_images, detect_in_part
from pipeline.inference.proposal_store import ProposalStore

CPU = torch.device("cpu")


@pytest.fixture
def val(tiny_detector, shapes_directory) -> tuple[ProposalStore, Path]:
    """A store of proposals and the folder of its images."""
    store = ProposalStore(tiny_detector.parents[1] / "proposals" / "val")
    return store, shapes_directory / "images" / "val"


def test_one_bad_image_loses_no_other(tiny_detector, val, tmp_path, capsys):
    """One too large for the memory, one unreadable, one that has been replaced by another."""
    (store, folder), images = val, tmp_path / "images"
    shutil.copytree(folder, images)
    large, torn, other, *names = (image["file_name"] for image in store.images().values())
    (images / torn).write_bytes((images / torn).read_bytes()[:500])
    cv2.imwrite(str(images / other), np.zeros((20, 30, 3), np.uint8))
    detector, _ = load_detector(tiny_detector, CPU)
    detect = detector.detect_by_count

    def run_out_of_memory(image, proposals, counts, **options):
        if proposals.file_name == large:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return detect(image, proposals, counts, **options)

    detector.detect_by_count = run_out_of_memory
    summary = detect_images(detector, store, images, tmp_path / "out", settings={})
    assert summary.done == len(names) > 0
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {one["image_id"] for one in found} == {
        i for i, image in store.images().items() if image["file_name"] in names
    }
    assert len(found) == summary.found
    printed = capsys.readouterr().out
    expected = [(large, "out of memory"), (torn, "truncated"), (other, "30x20")]
    for message, (name, reason) in zip(sorted(summary.broken), expected, strict=True):
        assert name in message and reason in message and message in printed


def test_names_in_a_store_do_not_lead_out_of_the_folder(val, tmp_path):
    whole, images = val
    inside, up, absolute = itertools.islice(whole, 3)
    up.file_name, absolute.file_name = f"../val/{up.file_name}", str(images / absolute.file_name)
    store, broken = ProposalStore(tmp_path), []
    store.write_shard([inside, up, absolute])
    found = detect_in_part(lambda _, p: p.file_name, store, *store.parts(), images, broken)
    assert [name for _, name in found] == [inside.file_name]
    assert all(
        name in text for name, text in zip([up.file_name, absolute.file_name], broken, strict=True)
    )


def test_interrupted_detections_go_on_where_they_were(tiny_detector, val, tmp_path):
    """To the same file; with other settings they start from the beginning."""
    whole, images = val
    store, output = ProposalStore(tmp_path / "store"), tmp_path / "out"
    store.directory.mkdir()
    for proposals in whole:  # one image a shard
        store.write_shard([proposals])
    detector, settings = load_detector(tiny_detector, CPU)
    assert "chunk" not in settings and settings["nms"] == 0.3
    detect, seen = detector.detect_by_count, []

    def noted(image, proposals, counts, **options):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(proposals.file_name)
        return detect(image, proposals, counts, **options)

    detector.detect_by_count, stop = noted, 3
    with pytest.raises(KeyboardInterrupt):
        detect_images(detector, store, images, output, settings=settings)
    assert not (output / "detections.json").exists() and len(seen) == stop
    stop = -1
    detect_images(detector, store, images, output, settings=settings)
    assert len(seen) == len(set(seen)) == len(store.shards()) > 3
    detect_images(detector, whole, images, tmp_path / "at_once", settings=settings)
    first, second = (tmp_path / d / "detections.json" for d in ("out", "at_once"))
    assert first.read_text() == second.read_text() and not (output / "parts").exists()

    seen, stop = [], 2
    with pytest.raises(KeyboardInterrupt):
        detect_images(detector, store, images, output, settings=settings)
    assert first.read_text() == second.read_text()  # what there is stays until there is better
    stop = -1
    detect_images(detector, store, images, output, settings=settings | {"nms": 0.4})
    assert len(seen) == 2 + len(store.shards())
