"""The evaluation of a run against its teacher (ALGORITHM.md section 7)."""
