"""COCO's category ids, which index upstream classifiers."""

NUM_COCO_IDS = 91
# Category ids of the 80 classes, in order: 1 to 90 without those that no annotation uses.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
