"""One reader per format; each turns a location into a COCO dict and nothing else.

A reader is a module with `splits`, `visit`, `image_root` and `add`; `sources` calls them.
"""
