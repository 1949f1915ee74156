"""Convert: teacher and student as F16 GGUF files."""
