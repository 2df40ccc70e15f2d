"""What the command-line tools share: options, and errors in one line."""

import argparse
import atexit
import gc
import glob
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from datasets.image_survey import AUTO, EXIF_CHOICES
from datasets.images import MAX_PIXELS
from datasets.loading import catch_stop_signals
from datasets.object_sizes import LogScales
from datasets.remote import is_uri, to_path
from pipeline import distributed
from pipeline.precision import PRECISIONS

ENGINES = ("local", "ray")
NUM_DRAWN = 10  # results in an image of somebody who names no folder for them


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop, by the signal `signum`."""

    def __init__(self, signum: int = signal.SIGINT):
        super().__init__(signum)
        self.signum = signum


def run_tool(main: Callable[[], int | None]) -> None:
    """Runs a tool's main function and exits.

    The exit code is 0, what the function returns, 2 after one line on a user's mistake, or of a
    process that was asked to stop 128 plus the signal's number, as in a shell. Functions below
    raise ValueError or OSError for bad input and FloatingPointError for a loss that is not finite;
    MASKPATH_TRACEBACK=1 shows where from.
    """
    if main.__module__ == "__main__":
        if sys.getfilesystemencoding() == "ascii":
            # PYTHONUTF8=0 in the C locale: names of files in annotations could not be opened.
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
        atexit.register(gc.freeze)  # else Python takes a second to look through PyTorch's modules
    for stream in (sys.stdout, sys.stderr):  # file names may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _orderly_stop():
            status = main() or 0
            sys.stdout.flush()
        sys.exit(status)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("MASKPATH_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError):
            _close_stdout()
        line = "error: " + " ".join(describe_error(error).split())
        if distributed.is_first_to_say(line):
            with suppress(OSError):
                print(line, file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        try:
            sys.stdout.flush()
        except OSError:  # Ctrl-C has ended what read it, too
            _close_stdout()
        sys.exit(128 + (stop.signum if isinstance(stop, Interrupted) else signal.SIGINT))


@contextmanager
def _orderly_stop() -> Iterator[None]:
    """Stop signals raise `Interrupted`, so that what is done is written and the rest removed."""

    def stop(signum: int, _: FrameType | None) -> None:
        raise Interrupted(signum)

    previous = catch_stop_signals(stop)
    try:
        yield
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)


def _close_stdout() -> None:
    """Nobody reads it any more: the interpreter must not fail on it once more at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_error(error: Exception) -> str:
    """What the error says; the system's own errors as file and reason, without a number."""
    if isinstance(error, BrokenPipeError):
        return "what reads this program's output has ended (broken pipe)"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename2 or error.filename}: {error.strerror}"  # the second: of a renaming
    return str(error)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows the description, a tool's docstring, line by line."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds --config and --set, the arguments of `pipeline.recipe.load_config`."""
    parser.add_argument("--config", required=True, help="a recipe, see configs/")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        help="change values of the recipe, for example deepmask.optim.lr=1e-4",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device; the default is CUDA where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=default, type=_device, help=f"cpu or cuda (here: {default})"
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Adds --engine, --workers and --address, see `pipeline.inference.engines`."""
    group = parser.add_argument_group("who does the images")
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="local: this process, or those of torchrun; ray: workers of Ray, on this machine or "
        "several (default: local)",
    )
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="of Ray (default: one for each GPU, on CPUs one for each core: that is fastest)",
    )
    group.add_argument(
        "--address",
        metavar="HOST:PORT|auto",
        help="of a Ray cluster that runs (default: one on this machine, for this run)",
    )


def add_precision(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Adds --precision, see `pipeline.precision.choose_precision`."""
    words = default or "bf16 on CUDA, fp32 on a CPU"
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=default,
        help="of the network; auto is bf16 on CUDA, and on a CPU with units for it if that is "
        f"faster, measured for a second (default: {words})",
    )


def add_images(parser: argparse.ArgumentParser, *, required: bool, help: str) -> None:
    """Adds --images, --exif and --max-pixels, see `propose_images`."""
    parser.add_argument(
        "--images",
        required=required,
        nargs="+",
        metavar="DIR_OR_FILE_OR_GLOB_OR_LIST_OR_URI",
        help=help,
    )
    parser.add_argument(
        "--exif",
        choices=EXIF_CHOICES,
        default=AUTO,
        help="whether images are turned as their EXIF orientation says; auto: as the annotated "
        "sizes show, else apply (default: auto)",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"images that have more are not decoded (default: {MAX_PIXELS:,})",
    )


def add_results(parser: argparse.ArgumentParser, kind: str) -> None:
    """Adds --output and --draw; `choose_results` fills in what is not given.

    `kind` is the folder below runs/ for results without --output.
    """
    parser.add_argument(
        "--output",
        type=to_path,
        help=f"folder of the results, or its URI (default: runs/{kind}/NAME, by the images' name)",
    )
    parser.add_argument(
        "--draw",
        type=int,
        metavar="K",
        help=f"draw the best K of every image (default: 0, without --output {NUM_DRAWN})",
    )


def choose_results(args: argparse.Namespace, kind: str) -> None:
    """Sets --output and --draw where they are not given."""
    if args.draw is None:
        args.draw = NUM_DRAWN if args.output is None else 0
    if args.output is None:
        named = to_path(args.images[0] if args.images else args.proposals)
        while glob.has_magic(named.name):
            named = named.parent
        args.output = Path("runs", kind, named.resolve().stem or "images")


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """What --shard gave, as 2/8: the part and how many there are.

    Raises:
        ValueError: something else.
    """
    if text is None:
        return None
    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise ValueError(f"--shard must be I/N with I from 1 to N, as 2/8, got {text}")
    return int(part), int(count)


def add_num_proposals(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --num-proposals and --per-megapixel; `default` says where their defaults come from."""
    parser.add_argument("--num-proposals", type=int, help=f"per image (default: {default})")
    parser.add_argument(
        "--per-megapixel",
        type=float,
        metavar="N",
        help=f"so many for each megapixel, where that is more (default: {default})",
    )


def add_proposing(parser: argparse.ArgumentParser) -> None:
    """Adds the options of how to propose, see `proposing_options`."""
    group = parser.add_argument_group("how to propose")
    group.add_argument(
        "--scales",
        nargs="+",
        metavar="auto|MIN MAX STEP",
        help="log2 of the image scales; auto: those for the objects that the network was trained "
        "on (default: what the recipe names, else auto; -2.5 .5 .5 as published)",
    )
    group.add_argument(
        "--zoom", action="store_true", default=None, help="add the scale 2^1, for small objects"
    )
    group.add_argument(
        "--no-refine",
        dest="refine",
        action="store_false",
        default=None,
        help="coarse masks of a SharpMask",
    )
    group.add_argument(
        "--nms",
        type=float,
        metavar="IOU",
        help="drop masks with this IoU with a better one (default: the checkpoint's)",
    )
    group.add_argument(
        "--soft-nms",
        action="store_true",
        default=None,
        help="with --nms: give them lower scores instead",
    )
    group.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="for maps of the network that proposes; larger images go through it by bands of rows, "
        "with the same results (default: .4 on a CPU, a quarter of what is free on CUDA)",
    )


def proposing_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_proposing` that were given, as arguments of `load_proposer`.

    Raises:
        ValueError: --scales are neither auto nor three numbers.
    """
    options = {
        "log2_scales": parse_scales(args.scales),
        "zoom": args.zoom,
        "refine": args.refine,
        "nms": args.nms,
        "soft_nms": args.soft_nms,
        "memory": args.memory,
    }
    return {name: value for name, value in options.items() if value is not None}


def parse_scales(words: list[str] | None) -> LogScales | str | None:
    """What --scales gave: auto, or three numbers.

    Raises:
        ValueError: something else.
    """
    if words is None:
        return None
    if words == [AUTO]:
        return AUTO
    try:
        low, high, step = map(float, words)
    except ValueError:
        raise ValueError(f"--scales must be auto or MIN MAX STEP, got {' '.join(words)}") from None
    return low, high, step


def local_path(name: str) -> Path:
    """A path of this machine; the type of --output of tools that write nowhere else."""
    if is_uri(name):
        raise argparse.ArgumentTypeError(f"{name} is in an object store; give one of this machine")
    return Path(name)


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name!r} is neither cpu nor cuda nor cuda:N")
    if name == "cpu":
        return name
    if not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this PyTorch sees no CUDA device; use --device cpu")
    if int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise argparse.ArgumentTypeError(f"{name} is not one of {count} CUDA devices, from 0 on")
    return name
