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
    switches = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
    return np.diff(switches, prepend=0, append=mask.size).tolist()


model, photo, output, drawn = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
settings = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
nms, soft = settings["nms"] or 2, settings["soft_nms"]  # 2: no masks are too much alike
waiting, results, picture = [], [], cv2.imread(photo)
image = np.ascontiguousarray(picture[:, :, ::-1])  # OpenCV has BGR
for score, *place in zip(*session.run(None, {"image": image}), strict=True):
    mask = paste(*place, image.shape[:2], settings["mask_threshold"])
    waiting.append([float(score), np.count_nonzero(mask), mask])
while waiting := [each for each in waiting if each[0] * each[1] > 0]:
    score, area, mask = waiting.pop(max(range(len(waiting)), key=lambda i: waiting[i][0]))
    for other in (o for o in waiting if min(o[1], area) >= nms * max(o[1], area)):
        iou = np.count_nonzero(mask & other[2]) / np.count_nonzero(mask | other[2])
        other[0] *= 1 if iou < nms else 1 - iou if soft else 0
    result = {"image_id": 1, "category_id": 1, "score": score}
    rle = {"size": mask.shape, "counts": run_lengths(mask)}
    results.append(result | {"bbox": cv2.boundingRect(mask.view("u1")), "segmentation": rle})
    if len(results) <= 10:
        picture[mask] = picture[mask] // 2 + np.random.randint(128, size=3, dtype=np.uint8)
with open(output, "w") as file:
    json.dump(results, file)
cv2.imwrite(drawn, picture)
