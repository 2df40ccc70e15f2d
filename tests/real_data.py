"""Where the tests find real images, weights and the originals' files; they skip without them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = (ROOT / "data", ROOT.parent / "shared" / "data")
DATA = next((place for place in PLACES if place.is_dir()), PLACES[0])
COCO_MINI = DATA / "coco-mini"
COCO_MINI_VAL = COCO_MINI / "annotations" / "instances_val.json"
TORCH7 = DATA / "torch7"
WEIGHTS = DATA / "weights"
