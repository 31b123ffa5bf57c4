"""The Triton and Gluon kernels of the loss operator, and what launches them; see README.md."""
