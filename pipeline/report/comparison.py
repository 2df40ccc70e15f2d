"""DeepMask and SharpMask compared: the same proposals before and after the refinement.

SharpMask is trained on a frozen DeepMask, so both propose masks at the same cells with the same
scores: the two masks of a cell are found by score and box, and are shown side by side.
Letters: D, D' proposals of the two stages and P pairs of them; G objects of an image.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.coco import CocoInstances
from pipeline.inference.proposals import Proposals
from pipeline.report.drawing import draw_object
from pipeline.report.pictures import (
    FOUND_IOU,
    Example,
    Gallery,
    Scene,
    box_ious,
    make_example,
    spread,
)

NAMES = {"deepmask": "DeepMask", "sharpmask": "SharpMask"}  # coarse, refined
SAME_SCORE = 1e-4  # the scores of a cell differ by rounding only
NUM_OBJECTS = 8


@dataclass(frozen=True)
class RefinedObject:
    """An object, and its coarse and its refined mask with their IoUs."""

    file_name: str
    annotation: int
    masks: list[dict]
    ious: np.ndarray

    @property
    def gain(self) -> float:
        """What the refinement changed; objects are ordered by it."""
        return float(self.ious[1] - self.ious[0])


def object_gallery(
    coarse: list[Scene[Proposals]],
    refined: list[Scene[Proposals]],
    coco: CocoInstances,
    images: Path,
) -> Gallery:
    """Objects that both stages found with the same proposal, from the smallest gain on."""
    coarse_scenes = {scene.found.image_id: scene for scene in coarse}
    objects: list[RefinedObject] = []
    num_proposals = num_pairs = 0
    for scene in refined:
        if before := coarse_scenes.get(scene.found.image_id):
            pairs = same_proposals(before.found, scene.found)
            num_proposals, num_pairs = num_proposals + len(before.found), num_pairs + len(pairs)
            objects += refined_objects(before, scene, pairs)
    objects.sort(key=lambda o: o.gain)
    totals = {
        "proposals": num_proposals,
        "pairs": num_pairs,
        "objects": len(objects),
        "better": sum(o.gain > 0 for o in objects),
    }
    examples = [draw_refinement(o, coco, images) for o in spread(objects, NUM_OBJECTS)]
    return Gallery({"": examples}, totals)


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
) -> list[RefinedObject]:
    """The objects that a pair of masks fits, each with the pair that fits it best.

    How well a pair fits is the mean IoU of its two masks, so that neither stage is favored.
    """
    if not len(pairs):
        return []
    ious = np.stack([coarse.overlaps[pairs[:, 0]], refined.overlaps[pairs[:, 1]]])  # (2, P, G)
    fit, objects = ious.mean(axis=0), []
    for g, p in enumerate(fit.argmax(axis=0)):
        if fit[p, g] >= FOUND_IOU:
            masks = [coarse.found.rle(int(pairs[p, 0])), refined.found.rle(int(pairs[p, 1]))]
            name, annotation = coarse.found.file_name, coarse.objects[g]
            objects.append(RefinedObject(name, annotation, masks, ious[:, p, g]))
    return objects


def draw_refinement(o: RefinedObject, coco: CocoInstances, images: Path) -> Example:
    """Two pictures of an object: with its coarse and with its refined mask."""
    box, truth = coco.boxes[o.annotation], coco.rle(o.annotation)

    def draw(image: np.ndarray) -> list[np.ndarray]:
        return [draw_object(image, box, truth, mask) for mask in o.masks]

    return make_example(images, o.file_name, o.ious, draw)
