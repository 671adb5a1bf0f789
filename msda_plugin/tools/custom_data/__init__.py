"""``train --data``: find, check and convert custom data (COCO, YOLO, Pascal VOC), and write a config for it."""
