"""The coordinator's side of the link: dispatcher, gRPC service, metrics, blocklist."""
