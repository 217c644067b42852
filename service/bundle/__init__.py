"""The avatar bundle, where training and serving meet: manifest, skeleton, files.  NumPy and pydantic only."""
