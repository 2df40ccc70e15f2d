"""From COCO-format files to training examples. Nothing here knows a network or a config."""
