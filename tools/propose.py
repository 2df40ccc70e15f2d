#!/usr/bin/env python
r"""Proposes object masks for images: folders, files or globs.

    python tools/propose.py --images photo.jpg
    python tools/propose.py --checkpoint runs/coco/sharpmask --images photos --output runs/photos
    python tools/propose.py --images list.txt --shard 1/8 --output runs/photos
    python tools/propose.py --images list.txt --engine ray --output runs/photos

Writes a proposal store (Parquet shards), proposals.json (COCO results) and, with --draw, pictures.
Started again after an interruption it does only what is left.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import distributed
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
    parse_shard,
    proposing_options,
    run_tool,
)
from pipeline.inference.engines import open_engines
from pipeline.inference.memory import keep_freed_blocks
from pipeline.inference.openvino import BACKENDS
from pipeline.inference.propose import load_proposer
from pipeline.inference.propose_folders import propose_images
from pipeline.precision import precision_name
from pipeline.pretrained import pretrained_checkpoint

KIND = "proposals"


def main() -> int:
    """Proposes masks; the exit status is 2 if no image could be read."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        help="a trained DeepMask or SharpMask (default: the one in models/pretrained)",
    )
    add_images(
        parser,
        required=True,
        help="one or several; or a list: a text with a path or URI (s3://bucket/photo.jpg) a line, "
        "or a Parquet file with a column file_name; or the URI of a folder",
    )
    add_results(parser, KIND)
    parser.add_argument(
        "--annotations", metavar="COCO.json", help="gives image ids and which images to take"
    )
    add_num_proposals(parser, default="the checkpoint's")
    add_proposing(parser)
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="torch",
        help="openvino-int8 is about twice as fast on a CPU and gives nearly the same proposals; "
        "it is calibrated on the images first (default: torch)",
    )
    parser.add_argument(
        "--no-json",
        dest="json",
        action="store_false",
        help="only the store: proposals.json would be several times as large",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="do every Nth image from the Ith on (from 1): N processes that know nothing of each "
        "other, as of a Slurm array, fill one --output; no json is written",
    )
    add_precision(parser, default="auto")
    add_device(parser)
    add_engine(parser)
    args = parser.parse_args()
    choose_results(args, KIND)
    shard = parse_shard(args.shard)

    keep_freed_blocks()
    with (
        distributed.process_group(args.device) as device,
        open_engines(
            args.engine, workers=args.workers, address=args.address, device=args.device
        ) as engine,
    ):
        load = partial(
            load_proposer,
            args.checkpoint or pretrained_checkpoint("sharpmask"),
            device,
            num_proposals=args.num_proposals,
            per_megapixel=args.per_megapixel,
            **proposing_options(args),
        )
        proposer, settings = load(precision=args.precision)
        summary = propose_images(
            proposer,
            args.images,
            args.output,
            settings=settings,
            annotations=args.annotations,
            exif=args.exif,
            max_pixels=args.max_pixels,
            draw=args.draw,
            backend=args.backend,
            shard=shard,
            write_json=args.json,
            engine=engine(partial(load, precision=precision_name(proposer.dtype))),
        )
    return 2 if summary.none_readable else 0


if __name__ == "__main__":
    run_tool(main)
