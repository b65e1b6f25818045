"""What becomes of detections: numbers and pictures."""
