"""What feedback alignment conserves."""
