"""From the files of pose estimators and motion capture to the plain `.npz` that the service reads; for the user's own
machine, where such files may be opened."""
