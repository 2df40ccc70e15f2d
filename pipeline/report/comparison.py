"""DeepMask beside SharpMask in the report: the same proposals before and after refinement.

SharpMask is trained on a frozen DeepMask, so both stages propose the same cells with the same
scores: the two masks of a cell are found by score and box, and seen side by side on an object.
Letters: D, D' proposals of the two stores and P pairs of them; G annotated objects of an image.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
from markupsafe import Markup
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from datasets.images import ImageError
from pipeline.inference.proposals import Proposals, ProposalStore
from pipeline.report.crops import draw_crops
from pipeline.report.pictures import FOUND_IOU, TOP, objects_of, spread
from pipeline.report.plots import plot_average_recalls, plot_recalls
from pipeline.report.run_files import Stage

NAMES = {"deepmask": "DeepMask", "sharpmask": "SharpMask"}  # coarse, refined
SAME_SCORE = 1e-4  # the scores of a cell in the two stores differ by rounding only
NUM_OBJECTS = 8


@dataclass(frozen=True)
class RefinedObject:
    """An object, and the proposal that was found for it.

    Attributes:
        image, annotation: indices into CocoInstances.
        masks, ious: coarse and refined: RLE, and IoU with the object.
    """

    image: int
    annotation: int
    masks: tuple[dict, dict]
    ious: tuple[float, float]

    @property
    def gain(self) -> float:
        """What the refinement changed: what objects are ordered by."""
        return self.ious[1] - self.ious[0]


@dataclass(frozen=True)
class ShownObject:
    """An object as it is shown.

    Attributes:
        ious: coarse, refined. tiles: data URIs of the same. error: why there are none.
    """

    file_name: str
    ious: tuple[float, float]
    tiles: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class FoundObjects:
    """Some of `num_found` objects; `num_better` of them gained by the refinement.

    Attributes:
        num_proposals: that were looked at. num_pairs: of them, that are in both stores.
    """

    shown: list[ShownObject]
    num_found: int
    num_better: int
    num_proposals: int
    num_pairs: int


@dataclass(frozen=True)
class Comparison:
    """What the page shows of the two stages; None for what the run does not have.

    Attributes:
        patches: rows of `rows_of`. proposals: the same by kind. plots: SVG by name.
    """

    names: tuple[str, ...]
    patches: dict[str, dict] | None
    proposals: dict[str, dict[str, dict]] | None
    plots: dict[str, Markup | None]
    objects: FoundObjects | None


def read_comparison(
    run: Path, stages: list[Stage], coco: CocoInstances | None, images: Path
) -> Comparison | None:
    """Put the two stages side by side; None if the run does not have both.

    Args:
        coco: the annotated objects; None if they could not be read.
    """
    if [stage.name for stage in stages] != list(NAMES):
        return None
    coarse, refined = stages
    curves = {NAMES[stage.name]: stage.curves for stage in stages}
    has_curves = all(curves.values())
    proposals = None
    if coarse.proposals and refined.proposals:
        proposals = {kind: rows_of(coarse.proposals[kind], refined.proposals[kind])
                     for kind in coarse.proposals}  # fmt: skip
    has_stores = all(stage.examples for stage in stages)  # both could be read
    return Comparison(
        names=tuple(NAMES.values()),
        patches=rows_of(coarse.patches, refined.patches),
        proposals=proposals,
        plots={
            "recall_by_iou": plot_recalls(curves, "mask") if has_curves else None,
            "average_recall": plot_average_recalls(curves) if has_curves else None,
        },
        objects=compare_objects(run, coco, images) if has_stores else None,
    )


def rows_of(coarse: dict | None, refined: dict | None) -> dict[str, dict] | None:
    """The metrics of both stages and their difference, absolute and relative to the first."""
    if not coarse or not refined:
        return None
    both = [name for name in coarse if None not in (coarse[name], refined.get(name))]
    return {
        **dict(zip(NAMES.values(), (coarse, refined), strict=True)),
        "difference": {name: refined[name] - coarse[name] for name in both},
        "relative": {name: refined[name] / coarse[name] - 1 for name in both if coarse[name]},
    }


# Which masks belong together, and which objects are shown.


def compare_objects(run: Path, coco: CocoInstances, images: Path) -> FoundObjects:
    """Find the objects that both stages found with the same proposal, and draw some of them."""
    index = {image_id: i for i, image_id in enumerate(coco.image_ids.tolist())}
    found, num_proposals, num_pairs = [], 0, 0
    for coarse, refined in images_of_both(
        *(ProposalStore(run / name / "proposals") for name in NAMES)
    ):
        image = index.get(coarse.image_id)
        objects = [] if image is None else objects_of(coco, image)
        if objects:
            coarse, refined = _first(coarse), _first(refined)
            pairs = same_proposals(coarse, refined)
            num_proposals, num_pairs = num_proposals + len(coarse), num_pairs + len(pairs)
            found += find_objects(image, coarse, refined, pairs, coco, objects)
    return FoundObjects(
        shown=[show_object(chosen, coco, images) for chosen in choose_objects(found)],
        num_found=len(found),
        num_better=sum(o.gain > 0 for o in found),
        num_proposals=num_proposals,
        num_pairs=num_pairs,
    )


def images_of_both(
    first: Iterable[Proposals], second: Iterable[Proposals]
) -> Iterator[tuple[Proposals, Proposals]]:
    """The images that have proposals in both stores; holds little if they come in like order."""
    waiting = ({}, {})
    for step in zip_longest(first, second):
        for side, proposals in enumerate(step):
            if proposals is None:
                continue
            other = waiting[1 - side].pop(proposals.image_id, None)
            if other is None:
                waiting[side][proposals.image_id] = proposals
            else:
                yield (other, proposals) if side else (proposals, other)


def _first(proposals: Proposals) -> Proposals:
    """The `TOP` proposals with the highest scores."""
    return replace(
        proposals,
        scores=proposals.scores[:TOP],
        boxes=proposals.boxes[:TOP],
        rles=proposals.rles[:TOP],
    )


def same_proposals(coarse: Proposals, refined: Proposals) -> np.ndarray:
    """The numbers of the proposals that come from the same cell, (P, 2).

    Their scores are equal, and of those with equal scores their boxes overlap most, seen from
    either side. A mask without a pixel is left out of its store: the other one has no partner.
    """
    if not len(coarse) or not len(refined):
        return np.empty((0, 2), int)
    overlaps = coco_mask.iou(_xywh(coarse), _xywh(refined), [0] * len(refined))  # (D, D')
    unequal = np.abs(coarse.scores[:, None] - refined.scores[None]) > SAME_SCORE
    overlaps[unequal] = 0
    theirs, ours = overlaps.argmax(axis=1), overlaps.argmax(axis=0)  # (D,), (D',)
    numbers = np.arange(len(coarse))
    mutual = (ours[theirs] == numbers) & (overlaps[numbers, theirs] > 0)
    return np.stack([numbers[mutual], theirs[mutual]], axis=1)


def _xywh(proposals: Proposals) -> np.ndarray:
    boxes = proposals.boxes.astype(float)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def find_objects(
    image: int,
    coarse: Proposals,
    refined: Proposals,
    pairs: np.ndarray,
    coco: CocoInstances,
    objects: list[int],
) -> list[RefinedObject]:
    """The objects that a pair of masks fits, each with the pair that fits it best.

    How well a pair fits is the mean IoU of its two masks, so that neither stage is favored.
    """
    if not len(pairs):
        return []
    truth = [coco.rle(a) for a in objects]
    masks = [(coarse.rle(n), refined.rle(m)) for n, m in pairs]
    ious = np.stack(
        [coco_mask.iou(list(side), truth, [0] * len(truth)) for side in zip(*masks, strict=True)]
    )  # (2, P, G)
    fit = ious.mean(axis=0)
    return [
        RefinedObject(image, a, masks[n], tuple(ious[:, n, g].tolist()))
        for g, (a, n) in enumerate(zip(objects, fit.argmax(axis=0), strict=True))
        if fit[n, g] >= FOUND_IOU
    ]


def choose_objects(found: list[RefinedObject]) -> list[RefinedObject]:
    """Objects that stand for all: ordered by gain, the middle one of each of equal parts."""
    return spread(sorted(found, key=lambda o: o.gain), NUM_OBJECTS)


def show_object(found: RefinedObject, coco: CocoInstances, images: Path) -> ShownObject:
    """Draw an object with either of its masks."""
    name, truth = coco.file_name(found.image), coco.rle(found.annotation)
    try:
        tiles = draw_crops(images / name, coco.boxes[found.annotation], truth, found.masks)
    except ImageError as error:
        return ShownObject(name, found.ious, error=str(error))
    return ShownObject(name, found.ious, tiles)
