"""What is measured: agreement with the true gradient, ranks, cost, and what feedback alignment conserves."""
