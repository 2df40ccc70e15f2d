#!/usr/bin/env python
r"""Detects objects: boxes and masks with categories, as COCO results.

    python tools/detect.py --images photo.jpg
    python tools/detect.py --checkpoint runs/coco/multipathnet \
        --proposals runs/photos --images photos --output runs/detections
    python tools/detect.py --checkpoint runs/coco/multipathnet \
        --proposal-checkpoint runs/coco/sharpmask --images photos --output runs/detections

With --proposals it takes a proposal store of tools/propose.py, else it makes one below --output.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.image_survey import AUTO
from datasets.images import MAX_PIXELS
from datasets.remote import to_path
from pipeline import distributed
from pipeline.checkpoint import find_checkpoint, find_proposer_beside, run_of
from pipeline.command import (
    add_device,
    add_engine,
    add_images,
    add_num_proposals,
    add_precision,
    add_proposing,
    add_results,
    choose_results,
    make_parser,
    proposing_options,
    run_tool,
)
from pipeline.inference.detect import compress_checkpoint, load_detector
from pipeline.inference.detect_folders import detect_images, image_folder
from pipeline.inference.engines import open_engines
from pipeline.inference.memory import keep_freed_blocks
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.propose import load_proposer
from pipeline.inference.propose_folders import propose_images
from pipeline.precision import precision_name
from pipeline.pretrained import pretrained_checkpoint

KIND = "detections"


def main() -> None:
    """Detects, or compresses a detector."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--checkpoint", help="a trained MultiPathNet (default: the one in models/pretrained)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--proposals", type=to_path, help="proposal store of tools/propose.py")
    source.add_argument(
        "--proposal-checkpoint",
        help="a DeepMask or SharpMask to propose with (default: of the runs beside --checkpoint, "
        "else the one in models/pretrained)",
    )
    source.add_argument(
        "--compress-fc",
        type=int,
        metavar="K",
        help="only write a checkpoint whose fc6 and fc7 have rank K into the file --output",
    )
    add_images(
        parser,
        required=False,
        help="with --proposals, the folder of their images (default: as they were made)",
    )
    parser.add_argument("--annotations", metavar="COCO.json", help="see tools/propose.py")
    add_results(parser, KIND)
    add_num_proposals(parser, default="the config's")
    parser.add_argument(
        "--box-voting-iou",
        "--vote",
        type=float,
        metavar="IOU",
        help="boxes of a class with this IoU are averaged (default: the config's)",
    )
    parser.add_argument(
        "--box-refinement-iters",
        "--localisations",
        type=int,
        metavar="N",
        help="times that detections are fed back as RoIs (default: the config's)",
    )
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="average with the mirrored image (default: the config's)",
    )
    parser.add_argument(
        "--short-sides",
        type=int,
        nargs="+",
        metavar="PX",
        help="of the image (default: the config's, else that of training)",
    )
    add_proposing(parser)
    add_precision(parser, default="auto")
    add_device(parser)
    add_engine(parser)
    args = parser.parse_args()

    checkpoint = args.checkpoint or pretrained_checkpoint("multipathnet")
    if args.compress_fc is not None:
        if args.output is None:
            raise ValueError("--compress-fc needs --output, the file to write")
        print(compress_checkpoint(checkpoint, args.compress_fc, args.output))
        return
    if args.proposals is None and args.images is None:
        raise ValueError("give --images, or --proposals made by tools/propose.py")
    choose_results(args, KIND)
    if args.proposals and args.annotations:
        raise ValueError("--annotations goes with --proposal-checkpoint; a store has its image ids")
    if args.proposals and (args.exif, args.max_pixels) != (AUTO, MAX_PIXELS):
        raise ValueError(
            f"--exif and --max-pixels are for proposals that are made here; {args.proposals} says "
            "how its images were read"
        )
    proposing = proposing_options(args)
    if args.proposals and proposing:
        raise ValueError(
            "--scales, --zoom, --no-refine, --nms, --soft-nms and --memory are for proposals that "
            f"are made here; {args.proposals} holds some"
        )
    names = (
        "num_proposals", "per_megapixel", "box_voting_iou", "box_refinement_iters", "flip",
        "short_sides",
    )  # fmt: skip
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    keep_freed_blocks()
    with (
        distributed.process_group(args.device) as device,
        open_engines(
            args.engine, workers=args.workers, address=args.address, device=args.device
        ) as engine,
    ):
        load = partial(load_detector, checkpoint, device, overrides=overrides)
        detector, settings = load(precision=args.precision)
        precision = precision_name(detector.dtype)  # measured once for all
        store = ProposalStore(args.proposals or args.output / "proposals")
        if args.proposals is None:
            beside = None
            if args.checkpoint:
                beside = find_proposer_beside(run_of(find_checkpoint(checkpoint)))
            proposes = args.proposal_checkpoint or beside or pretrained_checkpoint("sharpmask")
            distributed.say(f"proposals by {proposes}")
            load_other = partial(
                load_proposer,
                proposes,
                device,
                num_proposals=detector.options.num_proposals,
                per_megapixel=detector.options.per_megapixel,
                precision=precision,
                **proposing,
            )
            proposer, proposer_settings = load_other()
            propose_images(
                proposer,
                args.images,
                store.directory,
                settings=proposer_settings,
                annotations=args.annotations,
                exif=args.exif,
                max_pixels=args.max_pixels,
                above_output=args.output,
                engine=engine(load_other),
            )
        given = args.images if args.proposals else None
        if given and len(given) > 1:
            raise ValueError("--images: with --proposals, give the one folder of their images")
        folder = image_folder(store, given[0] if given else None)
        detect_images(
            detector,
            store,
            folder,
            args.output,
            settings=settings,
            draw=args.draw,
            engine=engine(partial(load, precision=precision)),
        )


if __name__ == "__main__":
    run_tool(main)
