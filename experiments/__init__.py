"""The experiments: plain networks, real data, one training loop, and a report. ``python -m experiments list``."""
