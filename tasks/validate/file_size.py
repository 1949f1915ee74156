"""Size: bytes of what ships."""

from tasks.validate.shipped import Shipped, size


def evaluate(shipped: Shipped) -> dict[str, float]:
    """`size_bytes`, and its ratio to the teacher's F16 file."""
    own_size = size(shipped.file)
    return {"size_bytes": float(own_size), "size_ratio": own_size / size(shipped.yardstick)}
