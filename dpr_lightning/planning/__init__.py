"""What a run will need, before it is paid for: memory, time and verdict from shapes alone, without weights or data."""
