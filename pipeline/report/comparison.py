"""DeepMask and SharpMask compared: the same proposals before and after the refinement.

SharpMask is trained on a frozen DeepMask, so both propose masks at the same cells with the same
scores: the two masks of a cell are found by score and box, and are shown side by side.
Letters: D, D' proposals of the two stages and P pairs of them; G objects of an image.
"""

from functools import partial
from typing import Any

import numpy as np

from datasets.coco import CocoInstances
from datasets.images import ImageFolder
from pipeline.inference.proposals import Proposals
from pipeline.report.drawing import draw_tiles
from pipeline.report.pictures import FOUND_IOU, Scene, box_ious, make_example, spread

SAME_SCORE = 1e-4  # the scores of a cell differ by rounding only
NUM_OBJECTS = 8


def object_gallery(
    coarse: list[Scene[Proposals]],
    refined: list[Scene[Proposals]],
    coco: CocoInstances,
    images: ImageFolder,
) -> dict[str, Any]:
    """Objects that both stages found with the same proposal, from the smallest gain on."""
    coarse_scenes = {scene.found.image_id: scene for scene in coarse}
    objects: list[tuple] = []
    num_proposals = num_pairs = 0
    for scene in refined:
        if before := coarse_scenes.get(scene.found.image_id):
            pairs = same_proposals(before.found, scene.found)
            num_proposals, num_pairs = num_proposals + len(before.found), num_pairs + len(pairs)
            objects += refined_objects(before, scene, pairs)
    objects.sort(key=lambda o: np.diff(o[-1])[0])
    return {
        "examples": [
            make_example(images, name, ious, partial(draw_tiles, coco.boxes[a], coco.rle(a), masks))
            for name, a, masks, ious in spread(objects, NUM_OBJECTS)
        ],
        "proposals": num_proposals,
        "pairs": num_pairs,
        "objects": len(objects),
        "better": sum(after > before for *_, (before, after) in objects),
    }


def same_proposals(coarse: Proposals, refined: Proposals) -> np.ndarray:
    """The indices of the proposals that come from the same cell, (P, 2).

    Their scores are equal, and of those with equal scores their boxes overlap most, seen from
    either side. An empty mask is not stored: then the other one has no partner.
    """
    if not len(coarse) or not len(refined):
        return np.empty((0, 2), int)
    overlaps = box_ious(coarse.boxes, refined.boxes)  # (D, D')
    overlaps[np.abs(coarse.scores[:, None] - refined.scores) > SAME_SCORE] = 0
    partners, back = overlaps.argmax(axis=1), overlaps.argmax(axis=0)  # (D,), (D',)
    indices = np.arange(len(coarse))
    mutual = (back[partners] == indices) & (overlaps[indices, partners] > 0)
    return np.stack([indices[mutual], partners[mutual]], axis=1)


def refined_objects(
    coarse: Scene[Proposals], refined: Scene[Proposals], pairs: np.ndarray
) -> list[tuple[str, int, list[dict], np.ndarray]]:
    """File name, annotation, pair of masks and their IoUs (2,) of each object that a pair fits.

    Of the pairs (P, 2), the one with the highest mean IoU, so that neither stage is favored.
    """
    if not len(pairs):
        return []
    ious = np.stack([coarse.overlaps[pairs[:, 0]], refined.overlaps[pairs[:, 1]]])  # (2, P, G)
    fit, objects = ious.mean(axis=0), []
    for g, p in enumerate(fit.argmax(axis=0)):
        if fit[p, g] >= FOUND_IOU:
            masks = [s.found.rle(int(i)) for s, i in zip((coarse, refined), pairs[p], strict=True)]
            objects.append((coarse.found.file_name, coarse.objects[g], masks, ious[:, p, g]))
    return objects
