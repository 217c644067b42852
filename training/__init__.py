"""The offline trainer: scans and SMPL fits in, an avatar bundle out."""
