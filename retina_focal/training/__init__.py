"""One assembly of a training, and what runs inside it."""
