"""What a run over many images did, written and printed."""

from collections import Counter
from dataclasses import dataclass, field

from datasets.files import write_json
from datasets.remote import AnyPath, RemotePath

DRAWN = "drawn"  # the folder of pictures, in that of the results


@dataclass
class Summary:
    """What a run did.

    Attributes:
        done: images of this run. done_before: of earlier runs.
        found: proposals or detections in all of them.
        broken: messages on images left out: unreadable, or the network failed on them.
        passed_over: number of other files in the folders, by what they are.
    """

    done: int
    done_before: int
    broken: list[str]
    found: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)

    @property
    def none_readable(self) -> bool:
        """Whether there were images and none of them could be used."""
        return bool(self.broken) and not self.done and not self.done_before


def report(
    summary: Summary, found: str, results: AnyPath, output: AnyPath, *, draw: int, part: str = ""
) -> None:
    """Writes broken.json and metrics.json, and prints the same; `found` is their name.

    `draw` is the number of results that are drawn in each image. `part` comes after the files'
    names, if the run does only a part of the images.
    """
    write_json(output / f"broken{part}.json", summary.broken)
    counts = {"images": summary.done + summary.done_before, "broken": len(summary.broken)}
    if passed_over := summary.passed_over.total():
        counts["passed_over"] = passed_over
    write_json(output / f"metrics{part}.json", counts | {found: summary.found})
    before = f" ({summary.done_before} were there already)" if summary.done_before else ""
    print(
        f"{counts['images']} images{before}, {summary.found:,} {found}, "
        f"{counts['broken']} files could not be used; results in {results}"
    )
    if draw:
        print(f"  pictures of the best {draw} in {output / DRAWN}")
    if passed_over:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.passed_over.most_common())
        print(f"  passed over {passed_over:,} other files: {kinds}")
    for message in summary.broken:
        print(f"  left out: {message}")


def check_draw(draw: int, output: AnyPath) -> None:
    """Raises a ValueError for a number of pictures below 0, or pictures in an object store."""
    if draw < 0:
        raise ValueError(f"--draw must be at least 0, got {draw}")
    if draw and isinstance(output, RemotePath):
        raise ValueError(f"--draw needs a folder of this machine as --output, got {output}")
