"""gRPC client and server on the HTTP/2 of `mesh.http`."""
