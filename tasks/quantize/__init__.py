"""Quantize: one variant of the student, as the file or folder that ships. One file a quantizer."""
