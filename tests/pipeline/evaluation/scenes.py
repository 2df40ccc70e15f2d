"""Small random COCO data sets, with results."""

import copy
import json

import numpy as np
from pycocotools import mask as mask_utils

from pipeline.evaluation.ground_truth import load_ground_truth
from tests.real_data import COCO_MINI_VAL, needs

needs_real_data = needs(COCO_MINI_VAL)
HEIGHT, WIDTH = 200, 260
CATEGORIES = {1: "person", 3: "car", 5: 'a "plane", large', 90: "nowhere"}  # the last has no object


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def triangle(x, y, w, h):
    return [[x, y, x + w, y, x, y + h]]


def compressed(outline):
    [rle] = mask_utils.frPyObjects(outline, HEIGHT, WIDTH)
    return rle | {"counts": rle["counts"].decode()}


def uncompressed(box):
    x, y, w, h = box
    mask = np.zeros((HEIGHT, WIDTH), int)
    mask[y : y + h, x : x + w] = 1
    flat = np.concatenate([[0], mask.ravel(order="F"), [2]])
    starts = np.flatnonzero(np.diff(flat, prepend=0))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(starts, prepend=1).tolist()}


def annotation(annotation_id, box, *, image_id=1, category_id=3, **other):
    x, y, w, h = box
    given = {"area": w * h, "bbox": list(box), "iscrowd": 0, "segmentation": rectangle(*box)}
    return {"id": annotation_id, "image_id": image_id, "category_id": category_id} | given | other


def result(box, score, *, image_id=1, category_id=1, outline=rectangle):
    found = {"image_id": image_id, "category_id": category_id, "score": score}
    return found | {"bbox": list(map(float, box)), "segmentation": compressed(outline(*box))}


def without(key, results):
    return [{k: v for k, v in r.items() if k != key} for r in results]


def write_dataset(folder, annotations, *, num_images=1, names=None, size=(HEIGHT, WIDTH)):
    sizes = dict(zip(("height", "width"), size, strict=True))
    names = names or [f"{i}.jpg" for i in range(1, num_images + 1)]
    images = [{"id": i, "file_name": name} | sizes for i, name in enumerate(names, start=1)]
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    path = folder / "truth.json"
    dataset = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(dataset))
    return path


def make_truth(folder, annotations, *, num_images=1):
    return load_ground_truth(write_dataset(folder, annotations, num_images=num_images))


def random_box(rng):
    """From a few whole pixels to most of the image, so that every area range is met."""
    w, h = np.exp(rng.uniform(np.log(6), np.log([WIDTH - 20, HEIGHT - 20])))
    x, y = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
    return [int(v) for v in (x, y, w, h)]


def random_scene(folder, seed, *, num_images=4, per_image=100):
    """A data set's path and results for it.

    Objects are overlapping triangles of all areas, two of them equal, some of them crowds. The
    first is of 32² px, small and medium to COCO, the third of 96² px, medium and large. The last
    image has none. Results are shifted copies of objects, some in a wrong category, noise and exact
    duplicates, with many equal scores.
    """
    rng = np.random.default_rng(seed)
    annotations = []
    for image_id in range(1, num_images):
        boxes = [[20, 30, 64, 32], [90, 60, 50, 40], [100, 40, 144, 128]]
        boxes += [random_box(rng) for _ in range(rng.integers(1, 6))]
        for i, box in enumerate(boxes + boxes[:1]):
            is_crowd = bool(i > 2 and rng.random() < 0.2)
            other = {"iscrowd": int(is_crowd), "category_id": int(rng.choice([1, 3, 5]))}
            other["segmentation"] = uncompressed(box) if is_crowd else triangle(*box)
            other["area"] = box[2] * box[3] / 2
            annotations.append(annotation(len(annotations) + 1, box, image_id=image_id, **other))
    results = []
    for i in range(num_images * per_image):
        image_id = 1 + i // per_image
        objects = [a for a in annotations if a["image_id"] == image_id]
        box, category_id = random_box(rng), int(rng.choice([1, 3, 90]))
        if objects and rng.random() < 0.7:
            origin = objects[rng.integers(len(objects))]
            box = np.maximum(np.array(origin["bbox"]) + rng.integers(-6, 7, 4), [0, 0, 2, 2])
            category_id = origin["category_id"] if rng.random() < 0.8 else category_id
        where = {"image_id": image_id, "category_id": category_id, "outline": triangle}
        results.append(result([int(v) for v in box], round(float(rng.random()), 1), **where))
    results += copy.deepcopy(results[: per_image // 4])
    return write_dataset(folder, annotations, num_images=num_images), results


def separate_objects(**other):
    """Six objects of 50 x 60 px, 20 px apart: nothing has IoU .5 with two of them."""
    corners = [(x, y) for y in (20, 110) for x in (20, 90, 160)]
    return [annotation(i, (x, y, 50, 60), **other) for i, (x, y) in enumerate(corners, start=1)]


def perfect_results(ground_truth):
    """The objects of a ground truth as results."""
    keys = ("image_id", "category_id", "bbox", "segmentation")
    annotations = [a for a in ground_truth.dataset["annotations"] if not a["iscrowd"]]
    return [{k: a[k] for k in keys} | {"score": 0.5} for a in annotations]
