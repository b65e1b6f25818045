"""The detector as a file that other runtimes run: image tensor in, boxes, scores, classes out."""
