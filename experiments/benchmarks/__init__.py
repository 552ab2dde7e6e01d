"""What steps cost: memory, time and bytes."""
