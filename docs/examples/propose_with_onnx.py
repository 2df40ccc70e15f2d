"""Object proposals for a photograph by ONNX Runtime, without PyTorch and without this project.

    python propose_with_onnx.py sharpmask.onnx photo.jpg proposals.json proposals.jpg

Writes COCO results and a picture of the best ten. tools/export_model.py made the .onnx file.
"""

import json
import sys

import cv2
import numpy as np
import onnxruntime


def interpolation(start, length, cells, side):
    """Which pixels of a side of the image a patch covers, and each one's shares of the cells."""
    low, high = np.ceil(np.array([start, start + length]) - 0.5).clip(0, side).astype(int)
    at = ((np.arange(low, high) + 0.5 - start) * cells / length - 0.5).clip(0, cells - 1)
    return slice(low, high), np.float32(np.maximum(0, 1 - abs(at[:, None] - np.arange(cells))))


def paste(patch, logits, shape, threshold):
    """The mask (height, width) of logits that lie in a patch of the image."""
    columns, across = interpolation(patch[0], patch[2], len(logits), shape[1])
    rows, down = interpolation(patch[1], patch[3], len(logits), shape[0])
    mask = np.zeros(shape, bool)
    mask[rows, columns] = down @ logits @ across.T > np.log(threshold / (1 - threshold))
    return mask


def run_lengths(mask):
    """COCO's: down the columns, background first."""
    pixels = mask.T.ravel().astype(np.int8)
    switches = np.flatnonzero(np.diff(pixels, prepend=0))
    return np.diff(switches, prepend=0, append=len(pixels)).tolist()


model, photo, output, drawn = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
settings = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
nms = settings["nms"] or 2  # 2: no masks are too much alike
picture = cv2.imread(photo)
image = np.ascontiguousarray(picture[:, :, ::-1])  # OpenCV has BGR
kept, results = [], []
for score, *place in zip(*session.run(None, {"image": image}), strict=True):
    mask = paste(*place, image.shape[:2], settings["mask_threshold"])
    box, area = cv2.boundingRect(mask.astype(np.uint8)), np.count_nonzero(mask)
    like = [m for m, a in kept if min(a, area) >= nms * max(a, area)]
    if area and all(np.count_nonzero(mask & m) < nms * np.count_nonzero(mask | m) for m in like):
        kept.append((mask, area))  # the best of those that are nearly the same
        rle = {"size": mask.shape, "counts": run_lengths(mask)}
        result = {"image_id": 1, "category_id": 1, "score": float(score), "bbox": box}
        results.append(result | {"segmentation": rle})
        if len(kept) <= 10:
            picture[mask] = picture[mask] // 2 + np.random.randint(128, size=3, dtype=np.uint8)
with open(output, "w") as file:
    json.dump(results, file)
cv2.imwrite(drawn, picture)
