"""What the dense reward says, found out without training, and experiments over many runs."""
