"""What executes a graph: one file per engine."""
