"""Every rule side by side."""
