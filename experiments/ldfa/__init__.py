"""Low-dimensional feedback alignment, by Hanut and Kadmon 2025."""
