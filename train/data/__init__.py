"""What the trainer reads from disk: images, data layouts, label lists, crops and batches."""
