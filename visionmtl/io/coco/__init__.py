"""COCO's JSON formats: one parser of annotations, panoptic files and results."""
