"""Judge: what was measured against the gates of params.yaml and of each device profile."""
