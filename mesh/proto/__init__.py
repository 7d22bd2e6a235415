"""Our trimmed protobuf schemas and the code protoc made of them; nothing else lives here."""
