"""Thin HTTP handlers: read the request, call the service, name the answer."""
