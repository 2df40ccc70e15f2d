"""Results of any content: a right score, or one line that says what is wrong."""

import json
import math

from hypothesis import strategies as st

from pipeline.evaluation.ground_truth import IOU_TYPES
from pipeline.evaluation.scores import score_detections, score_proposals
from tests.fuzzing import fuzzed
from tests.pipeline.evaluation.scenes import random_scene

number = st.integers(-5, 300) | st.integers() | st.floats()
anything = st.recursive(
    st.none() | st.booleans() | number | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
VALUES = {
    "image_id": number | anything,
    "category_id": st.sampled_from([1, 3, 1.0, True, "1"]) | anything,
    "score": st.floats(0, 1) | anything,
    "bbox": st.lists(number, min_size=4, max_size=4) | anything,
    "segmentation": st.fixed_dictionaries(
        {
            "size": st.sampled_from([[200, 260], [200.0, 260], [True, 260]]) | anything,
            "counts": st.text("01PQo`?4O\\'b", max_size=8) | anything,
        }
    )
    | anything,
}


@fuzzed(data=st.data())
def test_any_value_anywhere_is_scored_or_an_error_in_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "results"
    folder.mkdir(exist_ok=True)
    if not (folder / "truth.json").exists():
        _, results = random_scene(folder, 0, num_images=2, per_image=3)
        (folder / "good.json").write_text(json.dumps(results))
    results = json.loads((folder / "good.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(results) - 1))
        key = data.draw(st.sampled_from([None, *VALUES]))
        if key is None:
            results[i] = data.draw(anything)
        elif isinstance(results[i], dict):
            results[i][key] = data.draw(VALUES[key])
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    for score in (score_detections, score_proposals):
        try:
            metrics = score(folder / "truth.json", path, folder / "scores")
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            assert len(str(error)) < 400
            continue
        assert set(metrics) <= set(IOU_TYPES)
        for values in metrics.values():
            assert all(v is None or (0 <= v <= 1 and math.isfinite(v)) for v in values.values())
