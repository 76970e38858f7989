"""Pictures with objects: boxes, masks and names, read from COCO, Pascal VOC and YOLO files."""
