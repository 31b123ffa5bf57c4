"""What the methods gain: comparisons of trainings, and what explains them."""
