"""Size: bytes of what ships."""

from tasks.validate.shipped import Shipped, size


def evaluate(shipped: Shipped) -> dict[str, float]:
    """`size_bytes`, and its ratio to the teacher's F16 file."""
    found = size(shipped.file)
    return {"size_bytes": float(found), "size_ratio": found / size(shipped.yardstick)}
