"""Lightning callbacks: they watch, keep or stop a run, and never change an update."""
