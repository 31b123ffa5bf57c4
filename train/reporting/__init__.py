"""One HTML file that shows runs: `train/report.py`."""
