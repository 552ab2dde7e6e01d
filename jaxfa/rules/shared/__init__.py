"""What several rules share: projections, low rank, the Jacobian and its estimates."""
