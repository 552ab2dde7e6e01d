"""GrAPE: learned direct feedback, by Caillon et al. 2026."""
