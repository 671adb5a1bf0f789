"""COCO's 80 classes among its category ids, by which upstream classifiers are indexed."""

NUM_COCO_IDS = 91
# COCO's category ids in the order of its 80 classes: 1 to 90, but for those that no object has.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
