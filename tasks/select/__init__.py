"""Select: one student of several seeds, by its validation loss."""
