"""Image-level labels (paper, Sec. 3.5): a classification network, and pseudo masks of its maps."""
