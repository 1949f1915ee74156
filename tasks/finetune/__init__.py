"""Fine-tune: the teacher learns the task."""
