"""What all experiments share: data, tasks, the training loop, records, sweeps, figures and reports."""
