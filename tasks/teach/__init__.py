"""Teach: what the teacher says, once for all students: its answers to the test rows and to unlabelled prompts, its targets."""
