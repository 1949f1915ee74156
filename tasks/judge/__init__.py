"""Judge: what was measured against the gates of params.yaml."""
