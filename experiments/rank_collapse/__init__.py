"""Rank collapse of feedback alignment, and what undoes it."""
