"""The service on Ray Serve: the same application, with its engines on as many machines as Ray has."""
