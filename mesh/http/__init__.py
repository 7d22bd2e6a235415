"""HTTP/2 and its limits: the tunnel's own fast codec, and the h2 package under trio for gRPC."""
