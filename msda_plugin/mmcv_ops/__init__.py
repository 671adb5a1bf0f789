"""What mmcv needs of its compiled operators when it was installed without them."""
