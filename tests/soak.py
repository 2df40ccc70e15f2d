r"""Trains and proposes under random kills for hours; everything must come out as without them.

    python -m tests.soak --minutes 120 --output runs/soak

One run of DeepMask on shapes and one of proposals go through undisturbed. Then, until the time is
over, the same is done again and again while SIGKILL, SIGTERM and SIGINT come at random moments,
checkpoint writes and validation among them, each time followed by a resume. Prints kills, resumes,
files left behind and memory, and ends with status 1 if a weight or a proposal differs.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from pipeline.inference.proposal_store import ProposalStore

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Exit statuses; all but the first while Python imports, and our handlers are not there yet.
ENDED_BY = {signum: [128 + signum, -signum] for signum in SIGNALS}
ENDED_BY[signal.SIGINT].append(1)  # a library's import made an ImportError of it
DONE = {"train_stage": "best checkpoint:", "propose": "results in"}  # said last
SETTINGS = [
    "data.shapes.train_images=60",
    "data.shapes.val_images=60",
    "deepmask.optim.batch_size=8",
    "deepmask.optim.batches_per_epoch=40",
    "deepmask.optim.epochs=5",
    "deepmask.optim.validate_every=1",
    "deepmask.optim.validation_batches=4",
    "deepmask.optim.save_every_minutes=0.02",
    "deepmask.optim.log_every=10",
]
KEPT = {"config.yaml", "checkpoints", "metrics.jsonl", "tensorboard"}


def main() -> int:
    """Runs cycles of kills and resumes until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    args = parser.parse_args()
    # In a shell's background SIGINT is ignored, and so it would be by the tools started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    shapes = f"data.shapes.directory={args.output / 'shapes'}"
    rng, end = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    expected = args.output / "undisturbed"
    start = time.monotonic()
    for command in commands(expected, shapes):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    longest = time.monotonic() - start
    counts: Counter[str] = Counter()
    problems: list[str] = []
    memory: list[int] = []
    while time.monotonic() < end and not problems:
        run = args.output / "disturbed"
        shutil.rmtree(run, ignore_errors=True)
        for command in commands(run, shapes):
            disturb(command, max(6, longest / 4), rng, counts, problems)
        problems += differences(expected, run)
        memory.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
        counts["cycles"] += 1
        print(dict(counts), f"peak of a process {memory[-1]} MB", flush=True)
    report = {
        "counts": dict(counts),
        "problems": problems,
        "peak_mb_first_cycle": memory[0] if memory else None,
        "peak_mb_last_cycle": memory[-1] if memory else None,
    }
    (args.output / "soak.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
    return 1 if problems else 0


def commands(run: Path, shapes: str) -> list[list[str]]:
    """Training, then proposals with what was trained; both continue what is there."""
    python, tools = sys.executable, ROOT / "tools"
    config = ["--config", str(ROOT / "configs/shapes.yaml"), "--device", "cpu"]
    images = Path(shapes.partition("=")[2]) / "images" / "val"
    return [
        [python, str(tools / "train_stage.py"), "--stage", "deepmask", *config, "--resume",
         "--output", str(run / "deepmask"), "--set", shapes, *SETTINGS],
        [python, str(tools / "propose.py"), "--checkpoint",
         str(run / "deepmask/checkpoints/best.pt"), "--images", str(images), "--device", "cpu",
         "--precision", "fp32", "--num-proposals", "50", "--output", str(run / "proposals")],
    ]  # fmt: skip


def disturb(
    command: list[str], seconds: float, rng: random.Random, counts: Counter, problems: list[str]
) -> None:
    """Starts a command until it ends by itself, ending it at random moments before."""
    name = Path(command[1]).stem
    for _ in range(200):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
        try:
            output, _ = process.communicate(timeout=rng.uniform(0.2, seconds))
        except subprocess.TimeoutExpired:
            sent = rng.choice(SIGNALS)
            process.send_signal(sent)
            asked = time.monotonic()
            output, _ = process.communicate()
            if process.returncode == 0:
                counts[f"{name} ended before the signal"] += 1
                if DONE[name] not in output:
                    problems.append(f"{name} on {sent.name}: status 0, not done: {output[-500:]}")
                return
            counts[f"{name} {sent.name}"] += 1
            if process.returncode not in ENDED_BY[sent]:
                problems.append(f"{name} on {sent.name}: status {process.returncode}")
            if time.monotonic() - asked > 10:
                problems.append(f"{name}: {time.monotonic() - asked:.0f} s to end on {sent.name}")
            if "in main\n" in output:  # a traceback; Python has its own while it imports
                problems.append(f"{name} on {sent.name}: {output[-500:]}")
            continue
        if process.returncode:
            problems.append(f"{name}: status {process.returncode}: {output[-500:]}")
        counts[f"{name} resumed to its end"] += 1
        return
    problems.append(f"{name} does not get to its end")


def differences(expected: Path, found: Path) -> list[str]:
    """How weights, metrics, proposals and files differ from those without kills."""
    problems = []
    for name in ("best", "last"):
        one, other = (
            torch.load(run / f"deepmask/checkpoints/{name}.pt", weights_only=True)
            for run in (expected, found)
        )
        if one["step"] != other["step"] or any(
            not torch.equal(value, other["model"][key]) for key, value in one["model"].items()
        ):
            problems.append(f"{name}.pt has other weights")
    rows = [
        sorted((p.file_name, p.scores.tolist(), p.rles) for p in ProposalStore(run / "proposals"))
        for run in (expected, found)
    ]
    if rows[0] != rows[1]:
        problems.append("other proposals")
    left = [path.name for path in (found / "deepmask").iterdir() if path.name not in KEPT]
    left += [
        path.name
        for path in found.rglob("*")
        if path.is_file() and path.suffix in (".tmp", ".part")
    ]
    if left:
        problems.append(f"left behind: {', '.join(left)}")
    return problems


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
