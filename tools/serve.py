#!/usr/bin/env python
r"""A local page: click on an image, and the mask of the object there is drawn.

    python tools/serve.py
    python tools/serve.py --images photos --checkpoint runs/coco/sharpmask

Open the address that it prints. Other machines reach it with --host, and need the token that is in
the address then. docs/page.md says what the page can do.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import distributed
from pipeline.command import add_device, add_precision, make_parser, run_tool
from pipeline.inference.detect import load_detector
from pipeline.inference.memory import keep_freed_blocks
from pipeline.inference.propose import load_proposer
from pipeline.precision import precision_name
from pipeline.pretrained import pretrained_checkpoint
from pipeline.serve.app import create_app
from pipeline.serve.folder import ServedFiles
from pipeline.serve.run import choose_token, listen, serve
from pipeline.serve.service import MAX_BYTES, MAX_PIXELS, Service


def main() -> None:
    """Serves the page."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="FOLDER", help="whose images the page lists"
    )
    parser.add_argument(
        "--checkpoint",
        help="a trained DeepMask or SharpMask (default: the one in models/pretrained)",
    )
    parser.add_argument(
        "--detector", help="a trained MultiPathNet (default: the one in models/pretrained)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    parser.add_argument(
        "--token", help="who opens the page needs it (default: a new one if --host is not local)"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=MAX_BYTES, metavar="N",
        help=f"of an image that is dropped on the page (default: {MAX_BYTES:,})",
    )  # fmt: skip
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N",
        help=f"images that have more are not opened (default: {MAX_PIXELS:,})",
    )  # fmt: skip
    add_precision(parser, default="auto")
    add_device(parser)
    args = parser.parse_args()

    token = choose_token(args.host, args.token)
    files = ServedFiles(args.images, max_pixels=args.max_pixels)
    keep_freed_blocks()
    with distributed.process_group(args.device) as device, listen(args.host, args.port) as server:
        detector, _ = load_detector(
            args.detector or pretrained_checkpoint("multipathnet"), device, precision=args.precision
        )
        proposer, _ = load_proposer(
            args.checkpoint or pretrained_checkpoint("sharpmask"),
            device,
            precision=precision_name(detector.dtype),  # measured once for both
        )
        service = Service(
            proposer, detector, files, max_bytes=args.max_bytes, max_pixels=args.max_pixels
        )
        serve(create_app(service), server, args.host, token)


if __name__ == "__main__":
    run_tool(main)
