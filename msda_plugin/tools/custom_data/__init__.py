"""``train --data``: find, check and convert custom data in COCO format, and write a config for it."""
