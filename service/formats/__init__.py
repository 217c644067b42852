"""Clothed motion as files: each module writes one family of formats, streamed, vertex order that of the mesh."""
