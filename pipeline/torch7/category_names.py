"""The categories of COCO and of PASCAL VOC, in the order that detectors number them in."""

COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COCO_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # of 1 to 90
VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


def known_categories(count: int) -> list[dict]:
    """{"id", "name"} of each of COCO's 80 or VOC's 20; of others a number."""
    if count == len(COCO_NAMES):
        ids = [number for number in range(1, 91) if number not in COCO_UNUSED_IDS]
        return [{"id": i, "name": name} for i, name in zip(ids, COCO_NAMES, strict=True)]
    if count == len(VOC_NAMES):
        return [{"id": i, "name": name} for i, name in enumerate(VOC_NAMES, 1)]
    return [{"id": i, "name": f"class {i}"} for i in range(1, count + 1)]
