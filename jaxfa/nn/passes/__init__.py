"""How a model of taps runs: stored, streamed, over several devices, in a second pass, and in a rule's own phase."""
